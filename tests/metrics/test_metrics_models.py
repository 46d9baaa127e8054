"""CLIP, DINO and VQA models: transformers' own code on tiny models of the true architectures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from refusal import sentence
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import tiny_models as tiny
from PIL import Image

from retrieval_core.metrics.encoders import load_clip, load_dino
from retrieval_core.metrics.vqa import ask, score_answers
from retrieval_core.metrics.vqa_models import load_vqa

LONGEST = 6


def opt(folder):
    return tiny.make_instructblip(folder, "opt")


def t5(folder):
    return tiny.make_instructblip(folder, "t5")


MAKERS = {
    "blip": tiny.make_blip,
    "instructblip-opt": opt,
    "instructblip-t5": t5,
    "llava": tiny.make_llava,
    "idefics3": tiny.make_idefics3,
    "qwen2-vl": tiny.make_qwen2_vl,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """name -> folder of a tiny model, made once."""
    there = {}

    def make(name: str) -> Path:
        if name == "qwen2-vl":
            pytest.importorskip("torchvision", reason="Qwen2-VL's video processor needs it")
        if name not in there:
            makers = {**MAKERS, "clip": tiny.make_clip, "dino": tiny.make_dino}
            makers["dinov2"] = lambda folder: tiny.make_dino(folder, "dinov2")
            there[name] = makers[name](tmp_path_factory.mktemp(name))
        return there[name]

    return make


@pytest.fixture
def copied(folders, tmp_path):
    """A copy that a test may break."""
    return lambda name: Path(shutil.copytree(folders(name), tmp_path / "copy"))


def images(count: int = 3) -> torch.Tensor:
    """Different pictures of one size, in values that 8 bits hold."""
    random = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, 40, 48), generator=random) / 255


def pils(batch: torch.Tensor) -> list[Image.Image]:
    pixels = (batch * 255).round().byte().permute(0, 2, 3, 1)
    return [Image.fromarray(p.numpy()) for p in pixels]


def by_hand(name: str, folder: Path, picture: Image.Image) -> str:
    """The answer by greedy decoding written out, token after token, without generate."""
    import transformers as t

    processor = t.AutoProcessor.from_pretrained(folder)
    if name == "blip":
        model = t.BlipForQuestionAnswering.from_pretrained(folder)
        inputs = processor(images=picture, text=tiny.QUESTION, return_tensors="pt")
        seen = model.vision_model(inputs["pixel_values"]).last_hidden_state
        asked = model.text_encoder(
            inputs["input_ids"], inputs["attention_mask"], encoder_hidden_states=seen
        ).last_hidden_state
        start = [[model.config.text_config.bos_token_id]]

        def logits(tokens):
            return model.text_decoder(tokens, encoder_hidden_states=asked).logits

        end = model.config.text_config.sep_token_id
    elif name.startswith("instructblip"):
        model = t.InstructBlipForConditionalGeneration.from_pretrained(folder)
        inputs = processor(images=picture, text=tiny.QUESTION, return_tensors="pt")
        start = [[2]] if name.endswith("t5") else inputs.pop("input_ids").tolist()
        place = "decoder_input_ids" if name.endswith("t5") else "input_ids"
        mask = inputs.pop("attention_mask")
        more = {"attention_mask": mask} if name.endswith("t5") else {}

        def logits(tokens):
            return model(**inputs, **more, **{place: tokens}).logits

        end = 1
    else:
        model = t.AutoModelForImageTextToText.from_pretrained(folder)
        mark = "<|vision_start|><|image_pad|><|vision_end|>" if name == "qwen2-vl" else "<image>"
        text = f"USER: {mark}{tiny.QUESTION} ASSISTANT:"
        inputs = processor(images=[picture], text=[text], return_tensors="pt")
        start = inputs.pop("input_ids").tolist()
        inputs.pop("attention_mask")

        def logits(tokens):
            return model(input_ids=tokens, **inputs, use_cache=False).logits

        end = 1
    tokens = torch.tensor(start)
    with torch.no_grad():
        for _ in range(LONGEST):
            tokens = torch.cat([tokens, logits(tokens)[:, -1:].argmax(-1)], 1)
            if int(tokens[0, -1]) == end:
                break
    answer = tokens[0, len(start[0]) :]
    return processor.tokenizer.decode(answer, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", MAKERS)
def test_answers_are_greedy_decoding_without_the_question(folders, name):
    vqa = load_vqa(folders(name), max_new_tokens=LONGEST, batch_size=2)
    batch = images()
    answers = vqa.answer(batch, tiny.QUESTION)
    assert answers == [by_hand(name, folders(name), picture) for picture in pils(batch)]
    assert len(set(answers)) > 1  # the pictures are looked at
    assert answers == vqa.answer(batch, tiny.QUESTION)  # though the model is published as sampling
    assert vqa.answer(batch, "the cat?") != answers  # and the question is read
    assert not any(tiny.QUESTION in answer for answer in answers)


def test_answers_go_through_the_score(folders):
    vqa, clip = load_vqa(folders("llava"), max_new_tokens=LONGEST), load_clip(folders("clip"))
    result = score_answers(ask(images(), [tiny.QUESTION, "the pose?"], vqa), clip)
    assert result.score.count == 3 and 0 < result.score.mean < 100
    same = score_answers(ask(images(1).repeat(3, 1, 1, 1), [tiny.QUESTION], vqa), clip)
    assert same.score.mean == 0


def test_progress_comes_between_batches_and_may_interrupt(folders):
    vqa = load_vqa(folders("blip"), max_new_tokens=2, batch_size=2)
    seen = []
    vqa.answer(images(5), tiny.QUESTION, lambda done, total: seen.append((done, total)))
    assert seen == [(0, 5), (2, 5), (4, 5), (5, 5)]

    class StopError(Exception):
        pass

    def stop(done, total):
        if done:
            raise StopError

    with pytest.raises(StopError):
        vqa.answer(images(5), tiny.QUESTION, stop)


@pytest.mark.parametrize("name", ["blip", "instructblip-opt", "llava"])
def test_inputs_follow_the_model(folders, name):
    """A host moves and casts `.model`; the answers come from where it is."""
    vqa = load_vqa(folders(name), max_new_tokens=2, dtype=torch.bfloat16)
    assert {p.dtype for p in vqa.model.parameters()} >= {torch.bfloat16}
    assert len(vqa.answer(images(), tiny.QUESTION)) == 3
    vqa.model.to(torch.float32)
    whole = load_vqa(folders(name), max_new_tokens=2)
    assert {p.dtype for p in whole.model.parameters()} == {torch.float32}
    assert not whole.model.training and not any(p.requires_grad for p in whole.model.parameters())


@pytest.mark.parametrize("batch", [2, 16])
def test_clip_gives_projected_features_whatever_the_batch(folders, monkeypatch, batch):
    from transformers import CLIPModel, CLIPProcessor

    folder = folders("clip")
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    monkeypatch.setattr("retrieval_core.metrics.encoders.BATCH", batch)
    clip = load_clip(folder)
    texts = ["the cat", "a much longer text about the pose of the character", "the"]
    with torch.no_grad():
        said = []
        for text in texts:  # one by one, so nothing is padded
            found = model(**processor(text=text, images=pils(images()), return_tensors="pt"))
            said.append(found.text_embeds)
    unit = torch.nn.functional.normalize
    seen = unit(clip.embed_images(images()))
    torch.testing.assert_close(seen, found.image_embeds, atol=1e-4, rtol=1e-5)
    spoken = unit(clip.embed_texts(texts))
    torch.testing.assert_close(spoken, torch.cat(said), atol=1e-4, rtol=1e-5)
    assert clip.embed_texts(texts).shape == (3, 16)
    # Longer than the context of 77 tokens: read as far as it goes.
    cut = clip.embed_texts(["x" * 75 + " " + "y" * 300, "x" * 75 + " " + "z" * 300])
    torch.testing.assert_close(cut[0], cut[1])
    assert clip.embed_texts(["the"]).device.type == "cpu"


def test_models_load_inside_inference_mode_and_leave_it(folders):
    with torch.inference_mode():  # as a host does
        clip = load_clip(folders("clip"))
        clip.embed_texts(["the"])
    clip.model.to(torch.bfloat16)
    assert clip.embed_texts(["the"]).dtype == torch.float32


@pytest.mark.parametrize("name", ["dino", "dinov2"])
def test_dino_gives_the_cls_token(folders, monkeypatch, name):
    from transformers import AutoImageProcessor, AutoModel

    folder = folders(name)
    processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    inputs = processor(images=pils(images()), return_tensors="pt")
    with torch.no_grad():
        hidden = AutoModel.from_pretrained(folder)(**inputs).last_hidden_state
    monkeypatch.setattr("retrieval_core.metrics.encoders.BATCH", 2)
    dino = load_dino(folder)
    torch.testing.assert_close(dino.embed_images(images()), hidden[:, 0], atol=1e-4, rtol=1e-5)


def change(path: Path, **values) -> None:
    config = json.loads(path.read_text())
    config.update(values)
    path.write_text(json.dumps(config))


def test_other_kinds_are_refused(copied, folders):
    assert "'vit' and not CLIP" in sentence(load_clip, folders("dino"))
    assert "'clip' and not DINO" in sentence(load_dino, folders("clip"))
    assert "CLIPModel and answers no questions" in sentence(load_vqa, folders("clip"))
    folder = copied("blip")
    change(folder / "config.json", architectures=["BlipForConditionalGeneration"])
    message = sentence(load_vqa, folder)
    assert "BlipForConditionalGeneration and answers no questions" in message
    change(folder / "config.json", model_type="unheard-of", architectures=None)
    assert "unheard-of and answers no questions" in sentence(load_vqa, folder)


def test_a_chat_model_needs_its_template(copied):
    folder = copied("llava")
    for path in folder.glob("chat_template*"):
        path.unlink()
    change(folder / "processor_config.json", chat_template=None)
    assert "no chat template" in sentence(load_vqa, folder)


def test_folders_that_lack_something(copied):
    folder = copied("blip")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").unlink()
    assert "processor in" in sentence(load_vqa, folder)
    (folder / "preprocessor_config.json").unlink(missing_ok=True)
    (folder / "processor_config.json").unlink(missing_ok=True)
    assert "has no processor" in sentence(load_vqa, folder)
    (folder / "config.json").write_text("[1]")
    assert "has no processor" in sentence(load_vqa, folder)
    (folder / "preprocessor_config.json").write_text("{}")
    assert "config.json in" in sentence(load_vqa, folder)


def test_weights_that_are_not_there_are_not_made_up(copied):
    folder = copied("clip")
    path = folder / "model.safetensors"
    weights = load_file(path)
    gone = {k: v for k, v in weights.items() if k != "visual_projection.weight"}
    save_file(gone, path, {"format": "pt"})
    message = sentence(load_clip, folder)
    assert "lack 1 of CLIPModel" in message and "visual_projection" in message
    path.write_bytes(path.read_bytes()[:-1000])
    assert "cannot be loaded as CLIPModel" in sentence(load_clip, folder)
    path.unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert "only safetensors weights are read" in sentence(load_clip, folder)


@pytest.mark.parametrize("name", ["llava", "dinov2", "clip"])
def test_code_that_comes_with_a_model_is_not_run(copied, name):
    folder = copied(name)
    mark = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass Evil: pass\n")
    kinds = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor",
             "AutoImageProcessor", "AutoTokenizer")  # fmt: skip
    for path in folder.glob("*config.json"):
        change(path, auto_map={kind: "evil.Evil" for kind in kinds})
    {"llava": load_vqa, "dinov2": load_dino, "clip": load_clip}[name](folder)
    assert not mark.exists()
    change(folder / "config.json", attn_implementation="someone/kernel")
    load = {"llava": load_vqa, "dinov2": load_dino, "clip": load_clip}[name]
    assert "attention code from the hub" in sentence(load, folder)


def test_a_model_that_answers_nothing(folders):
    vqa = load_vqa(folders("blip"), max_new_tokens=2)
    config = vqa.model.config.text_config
    with torch.no_grad():  # the end of the answer always wins
        vqa.model.text_decoder.cls.predictions.bias[config.sep_token_id] = 1e6
    assert "answered nothing to 'what?' for 3 of 3" in sentence(ask, images(), ["what?"], vqa)


def test_without_transformers(monkeypatch, folders):
    import sys

    folder = folders("clip")
    monkeypatch.setitem(sys.modules, "transformers", None)
    for load in (load_clip, load_dino, load_vqa):
        place = folders("dino") if load is load_dino else folder
        assert "need the package transformers" in sentence(load, place)
