"""The nodes that score, in the host: models in its care, the graph's own, and the judge."""

from __future__ import annotations

import math
import shutil

import comfy.model_management as management
import comfy.utils
import folder_paths
import numpy as np
import pytest
import scoring_models
import tiny_models
import torch
from making import images
from retrieval_pack.nodes import vqa_diversity_score as vqa
from retrieval_pack.nodes.host import model_folders, scoring
from retrieval_pack.nodes.host.paperdoll_host import draw_references
from retrieval_pack.nodes.host.similarity_scores import CONNECTED, NAMED
from retrieval_pack.nodes.image_similarity import RetrievalImageSimilarity
from retrieval_pack.nodes.paperdoll_match import CLOTHES, RetrievalPaperdollMatch
from retrieval_pack.nodes.text_similarity import RetrievalTextSimilarity
from retrieval_pack.retrieval_core.errors import RetrievalError
from retrieval_pack.retrieval_core.metrics import vqa_models
from retrieval_pack.retrieval_core.metrics.diversity import find_extreme_pairs
from retrieval_pack.retrieval_core.metrics.encoders import load_clip, load_dino
from retrieval_pack.retrieval_core.metrics.similarity import image_similarity, text_similarity
from retrieval_pack.retrieval_core.metrics.vqa import DEFAULT_QUESTIONS, score_answers
from serving import has_weights, messages, with_inputs
from workflows import api_form, example, the_node

FOLDERS = ["blip", "broken", "group/silent", "llava"]
QUESTIONS = "describe the figure\n\ndescribe the pose"
weights = pytest.mark.skipif(not has_weights(), reason="the bundled weights are not there yet")


def refused(call, *words: str) -> None:
    with pytest.raises(RetrievalError) as caught:
        call()
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert text.endswith(".") and "\n" not in text and ". " not in text, text


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A models directory with one small model of each kind."""
    base = tmp_path_factory.mktemp("models")
    with torch.inference_mode(False):
        scoring_models.blip(base / "VQA" / "blip")
        scoring_models.blip(base / "VQA" / "group" / "silent", silent=True)
        tiny_models.make_llava(base / "LLM" / "llava")
        tiny_models.make_clip(base / "clip_vision" / "clip")
        tiny_models.make_dino(base / "dino" / "dinov2", "dinov2")
    broken = base / "LLM" / "broken"
    shutil.copytree(base / "VQA" / "blip", broken)
    (broken / "preprocessor_config.json").unlink()
    return base


@pytest.fixture
def bar(monkeypatch):
    """(done, total) of every move of the node's bar; a newer host shows only some of them."""
    for name in ("PROGRESS_THROTTLE_MIN_INTERVAL", "PROGRESS_THROTTLE_MIN_PERCENT"):
        monkeypatch.setattr(comfy.utils, name, 0, raising=False)
    shown = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *a, **_: shown.append(a[:2]))
    return shown


@pytest.fixture(autouse=True)
def hosts(models, monkeypatch, tmp_path):
    monkeypatch.setattr(folder_paths, "models_dir", str(models))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))


def loaded_models() -> list[str]:
    """The classes that the host has loaded."""
    found = (m.model.model for m in management.current_loaded_models if m.model is not None)
    return [type(m[0] if isinstance(m, torch.nn.Sequential) else m).__name__ for m in found]


def ask(batch, vqa_model="blip", questions=QUESTIONS, **more):
    more.setdefault("answer_encoder", "clip")
    more.setdefault("max_new_tokens", 6)
    return vqa.RetrievalVQADiversityScore.execute(batch, vqa_model, questions, **more)


def test_folders_are_found_in_the_models_directory():
    assert model_folders.list_models(model_folders.VQA) == FOLDERS
    assert "clip" in model_folders.list_models(model_folders.CLIP)
    assert "dinov2" in model_folders.list_models(model_folders.DINO)
    listed = {i.id: i for i in vqa.RetrievalVQADiversityScore.GET_SCHEMA().inputs}
    assert listed["vqa_model"].options == [vqa.JUDGE, *FOLDERS]


def test_only_folders_inside_the_models_directory(models):
    outside = ("../VQA/blip", "group/../../dino/dinov2", str(models / "VQA/blip"), "", "a\\b")
    for name in outside:
        refused(lambda n=name: model_folders.find_folder(model_folders.VQA, n), "in models/VQA")
    refused(lambda: ask(images(2), "gone"), "gone", "models/LLM")
    refused(lambda: ask(images(2), "broken"), "no processor")
    for name in ("../blip", "alone", "a/b/c", "/etc"):
        refused(lambda n=name: ask(images(2), vqa_repository=n), "owner/name")


def test_without_network(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refused(lambda: ask(images(2), vqa_repository="owner/name"), "could not be reached")
    refused(lambda: ask(images(2), encoder_repository="owner/name"), "could not be reached")


def test_a_download_moves_the_bar_and_can_be_interrupted(models, bar, monkeypatch):
    def fetch(name, progress):
        progress(1, 4)
        management.interrupt_current_processing(True)
        progress(2, 4)

    monkeypatch.setattr(model_folders, "fetch_model", fetch)
    with pytest.raises(management.InterruptProcessingException):
        ask(images(2), vqa_repository="owner/name")
    assert bar == [(1, 4)]


def test_the_score_of_a_vqa_model(models, bar, monkeypatch):
    """It equals the core's own, under the host's memory management and its bar."""
    seen = []
    answer = vqa_models.VQAModel.answer

    def watched(self, *args, **kw):
        seen.append(loaded_models())
        return answer(self, *args, **kw)

    monkeypatch.setattr(vqa_models.VQAModel, "answer", watched)
    batch = torch.cat([images(2), torch.zeros(1, 64, 64, 3)])
    out = ask(batch, batch_size=2)
    score, report, plot, most, least, weighted = out.args
    assert seen and all("BlipForQuestionAnswering" in names for names in seen)
    assert not {"BlipForQuestionAnswering", "CLIPModel"} & set(loaded_models())
    # Three images in batches of two, two questions; then the texts.
    steps = [done for done, total in bar if total == 6]
    assert steps == [0, 2, 3, 3, 5, 6]

    model = vqa_models.load_vqa(models / "VQA" / "blip", 6)
    lines = QUESTIONS.split("\n\n")
    answers = {q: answer(model, batch.movedim(-1, 1), q) for q in lines}
    result = score_answers(answers, load_clip(models / "clip_vision" / "clip"))
    assert score == pytest.approx(result.score.mean, abs=1e-3) and 0 < score < 200
    assert str(result.score).split("±")[0] in report and "±" in report
    assert all(given in report for row in answers.values() for given in row)
    assert plot.shape[0] == 1 and plot.shape[-1] == 3 and plot.dtype == torch.float32
    first, second = find_extreme_pairs(result.embeddings)
    assert torch.equal(most, batch[[first.first, first.second]])
    assert torch.equal(least, batch[[second.first, second.second]])
    assert math.isnan(weighted)
    shown_in_node = out.ui.as_dict()["images"]
    assert len(shown_in_node) == 1 and shown_in_node[0]["type"] == "temp"


def test_a_chat_model_of_the_other_folder():
    score, report = ask(images(3), "llava", "the pose", batch_size=2).args[:2]
    assert 0 <= score < 200 and "Answers by llava, compared by clip." in report
    assert not any(name.startswith("Llava") for name in loaded_models())


def test_equal_images_score_nothing():
    out = ask(images(1).expand(3, -1, -1, -1), batch_size=1)
    assert out.args[0] == 0.0


def test_interrupted_between_batches(bar, monkeypatch):
    """What was loaded is unloaded, too."""
    calls = []

    def hook(value, total, *_, **__):
        calls.append(value)
        if value == 1:
            management.interrupt_current_processing(True)

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    with pytest.raises(management.InterruptProcessingException):
        ask(images(3), batch_size=1)
    assert max(calls) == 1
    assert "BlipForQuestionAnswering" not in loaded_models()


def test_the_graphs_clip_compares_the_answers():
    clip = scoring_models.host_clip()
    out = ask(images(3), answer_encoder=vqa.AUTOMATIC, clip=clip)
    assert "the connected CLIP" in out.args[1] and "CLIPModel" not in loaded_models()
    encoder = scoring.HostTextEncoder(clip)
    one, other, same = encoder.embed_texts(["a (smile)", "beach", "a (smile)"])
    assert one.shape == (32,) and torch.equal(one, same) and not torch.equal(one, other)
    # As tokens without weights: brackets of an answer do not stress anything.
    plain = clip.tokenize("a (smile)", disable_weights=True)
    assert all(weight == 1.0 for _, weight in plain["l"][0])
    assert torch.equal(one, clip.encode_from_tokens(plain, return_pooled=True)[1][0].float())


@weights
def test_a_clip_without_pooled_output_is_refused():
    from retrieval_pack.nodes.load_paperdoll_demo import RetrievalPaperdollModel

    clip = RetrievalPaperdollModel.execute(1).args[1]
    with pytest.raises(RetrievalError):  # words that are no tags of its world
        ask(images(2), answer_encoder=vqa.AUTOMATIC, clip=clip)
    refused(lambda: scoring.HostTextEncoder(clip).embed_texts(["smile"]), "pooled")


@weights
def test_the_judge_needs_nothing():
    dolls = draw_references(7, "figure", 4)[0]
    out = vqa.RetrievalVQADiversityScore.execute(dolls, vqa.JUDGE, "\n".join(DEFAULT_QUESTIONS))
    score, report = out.args[:2]
    assert score > 0 and "the pose is" in report and "their words" in report
    equal = dolls[:1].repeat(3, 1, 1, 1)
    assert vqa.RetrievalVQADiversityScore.execute(equal, vqa.JUDGE, "pose").args[0] == 0.0
    refused(lambda: ask(images(2, 32), vqa.JUDGE, "pose"), "32 x 32", "64 x 64")

    match = RetrievalPaperdollMatch.execute(dolls, 7)
    other = RetrievalPaperdollMatch.execute(dolls, 7, 8, CLOTHES)
    assert match.args[0] > 80 > other.args[0]
    assert len(match.args[2].values) == 4 and "±" in match.args[1]
    out = vqa.RetrievalVQADiversityScore.execute(dolls, vqa.JUDGE, "pose", similarity=match.args[2])
    assert 0 < out.args[5] <= out.args[0] and "weighted" in out.args[1]


def test_image_similarity(models, tmp_path):
    batch, references = images(20, 48), images(2, 40, seed=9)
    found = RetrievalImageSimilarity.execute(batch, references, "CLIP-I", "clip").args
    pictures = batch.movedim(-1, 1), references.movedim(-1, 1)
    core = image_similarity(*pictures, load_clip(models / "clip_vision" / "clip"))
    assert found[0] == pytest.approx(core.estimate.mean, abs=1e-4)
    assert np.allclose(found[2].values, core.values, atol=1e-4)
    assert "±" in found[1] and "20: " in found[1] and "2 references" in found[1]
    found = RetrievalImageSimilarity.execute(batch, references, "DINO-I", "dinov2").args
    core = image_similarity(*pictures, load_dino(models / "dino" / "dinov2"))
    assert found[0] == pytest.approx(core.estimate.mean, abs=1e-4)
    assert not {"CLIPModel", "Dinov2Model"} & set(loaded_models())

    vision = scoring_models.host_clip_vision(tmp_path)
    execute = RetrievalImageSimilarity.execute
    same = execute(batch[:2], batch[:1], "CLIP-I", CONNECTED, clip_vision=vision).args
    assert same[2].values[0] == pytest.approx(100) and same[2].values[1] < 100
    refused(lambda: execute(batch, batch, "DINO-I", CONNECTED, clip_vision=vision), "DINOv2")
    refused(lambda: execute(batch, batch, "CLIP-I", CONNECTED), "connect a CLIP_VISION")
    refused(lambda: execute(batch, batch, "CLIP-I", "dinov2"), "models/clip_vision")
    refused(lambda: execute(batch[:0], batch, "CLIP-I", "clip"), "number of images is 0 ")
    refused(lambda: execute(batch, batch[:0], "CLIP-I", "clip"), "number of references is 0 ")


def test_text_similarity(models):
    batch = images(2, 48)
    execute = RetrievalTextSimilarity.execute
    clip = load_clip(models / "clip_vision" / "clip")
    core = text_similarity(batch.movedim(-1, 1), "a figure\non a beach", clip)
    found = execute(batch, "a figure\non a beach", "clip").args
    assert np.allclose(found[2].values, core.values, atol=1e-4)
    core = text_similarity(batch.movedim(-1, 1), ["a figure", "on a beach"], clip)
    found = execute(batch, "a figure\non a beach\n", "clip", prompt_per_line=True).args
    assert np.allclose(found[2].values, core.values, atol=1e-4)
    refused(lambda: execute(batch, " ", "clip"), "prompt", "empty")
    refused(lambda: execute(batch, "a\nb\nc", "clip", prompt_per_line=True), "3 prompts")
    refused(lambda: execute(batch, "a", NAMED), "repository")


def test_bad_input():
    refused(lambda: ask(images(1)), "number of images is 1 ", "at least 2")
    refused(lambda: ask(images(2), questions=" \n"), "no question")
    refused(lambda: ask(images(2), "group/silent"), "answered nothing")
    refused(lambda: ask(torch.rand(2, 8, 8, 1)), "RGB")
    refused(lambda: ask(images(2), answer_encoder=vqa.AUTOMATIC), "connect the CLIP")
    similarity = RetrievalTextSimilarity.execute(images(3), "a", "clip").args[2]
    refused(lambda: ask(images(2), similarity=similarity), "2 images and 3 similarities")
    assert "BlipForQuestionAnswering" not in loaded_models()


@weights
def test_the_workflow_scores_on_the_server(server, node_info):
    prompt = api_form(example("Demo - How different the pictures are"), node_info)
    prompt = with_inputs(prompt, the_node(prompt, "RetrievalPaperdollModel"), batch_size=3)
    prompt = with_inputs(prompt, the_node(prompt, "KSampler"), steps=3)
    entry = server.run(prompt)
    assert entry["status"]["status_str"] == "success", messages(entry, "execution_error")
    scored = the_node(prompt, "RetrievalVQADiversityScore")
    (plot,) = server.images(entry, scored)
    assert plot.shape[0] > 256 and plot.std() > 5
    (shown,) = server.images(entry, the_node(prompt, "PreviewImage", images=[scored, 2]))
    assert np.array_equal(shown, plot)
    text = entry["outputs"][the_node(prompt, "PreviewAny", source=[scored, 1])]["text"][0]
    assert text.startswith("VQA diversity: ") and "weighted by similarity" in text
