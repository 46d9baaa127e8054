"""The command on a folder of characters, with real CLIP, DINO and VQA code on tiny models."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from fake_comfyui import FakeComfyUI
from PIL import Image

pytest.importorskip("transformers")

import tiny_models as tiny

from retrieval_core.evaluate import __main__ as command
from retrieval_core.evaluate.characters import read_characters
from retrieval_core.evaluate.comfy import decode, encode
from retrieval_core.evaluate.command import read_protocol
from retrieval_core.metrics.encoders import load_clip, load_dino
from retrieval_core.metrics.vqa import DEFAULT_QUESTIONS, ask, score_answers
from retrieval_core.metrics.vqa_models import load_vqa

PROMPT = "the pose is standing"


@pytest.fixture
def characters(tmp_path):
    random = np.random.default_rng(0)
    folder = tmp_path / "characters"
    inner = folder / "held_out" / "eve"
    inner.mkdir(parents=True)
    for number in range(2):
        pixels = random.integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(inner / f"{number}.png")
    return folder


@pytest.fixture
def server():
    def execute(graph, uploads):
        random = torch.Generator().manual_seed(graph["2"]["inputs"]["seed"])
        return {"3": [encode(torch.rand(3, 40, 40, generator=random)) for _ in range(2)]}

    running = FakeComfyUI(execute)
    yield running
    running.close()


@pytest.fixture
def arguments(tmp_path, characters, server):
    graph = {
        "1": {"class_type": "LoadImage", "inputs": {"image": "a.png"},
              "_meta": {"title": "{reference1}"}},
        "2": {"class_type": "Draw", "inputs": {"seed": 0, "prompt": "", "samples": 1}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0]}},
    }  # fmt: skip
    (tmp_path / "w.json").write_text(json.dumps(graph))
    (tmp_path / "prompts.txt").write_text(PROMPT)
    return [
        "--out", str(tmp_path / "out"), "--server", server.address,
        "--characters", str(characters), "--in-domain", "0", "--held-out", "1",
        "--references", "2", "--seeds", "2", "--samples", "2",
        "--prompts", str(tmp_path / "prompts.txt"), "--workflow", f"theirs={tmp_path / 'w.json'}",
    ]  # fmt: skip


def test_a_folder_of_characters_is_scored_by_named_models(arguments, tmp_path, characters, capsys):
    clip, dino = tiny.make_clip(tmp_path / "clip"), tiny.make_dino(tmp_path / "dino")
    vqa = tiny.make_blip(tmp_path / "vqa")
    models = ["--clip", str(clip), "--dino", str(dino), "--vqa", str(vqa)]
    assert command.main([*arguments, *models]) == 0
    printed = capsys.readouterr().out
    for name in ("CLIP-I", "CLIP-T", "DINO-I", "diversity", "weighted diversity", "theirs"):
        assert name in printed
    assert command.main([*arguments, *models, "--report", "--json"]) == 0
    (line,) = json.loads(capsys.readouterr().out)["lines"]

    # The same from the pictures that lie there, without the evaluation.
    rows = [json.loads(ln) for ln in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    paths = [tmp_path / "out" / name for row in rows for name in row["pictures"]]
    pictures = torch.stack([decode(path.read_bytes()) for path in paths])
    assert len(pictures) == 4
    options = command.parse(arguments)
    (character,) = read_characters(characters, read_protocol(options, command.PRESETS))
    references = torch.stack([r.image for r in character.references])
    cosine = torch.nn.functional.cosine_similarity

    def like(encoder):
        ours, theirs = encoder.embed_images(pictures), encoder.embed_images(references)
        return 100 * float(cosine(ours[:, None], theirs[None], dim=-1).mean())

    encoder = load_clip(clip)
    text = encoder.embed_texts([PROMPT])
    said = 100 * float(cosine(encoder.embed_images(pictures), text).mean())
    assert line["CLIP-I"] == pytest.approx(like(encoder), abs=0.01)
    assert line["DINO-I"] == pytest.approx(like(load_dino(dino)), abs=0.01)
    assert line["CLIP-T"] == pytest.approx(said, abs=0.01)
    answers = ask(pictures, DEFAULT_QUESTIONS, load_vqa(vqa))
    expected = score_answers(answers, encoder)
    assert line["diversity"] == pytest.approx(expected.score.mean, abs=0.01)
    assert expected.score.mean > 0


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ([], "scored by CLIP"),
        (["--clip", "/nowhere"], "'/nowhere' is neither a folder here"),
        (["--clip", "VQA"], "not CLIP"),
        (["--clip", "CLIP", "--dino", "CLIP"], "not DINO"),
        (["--clip", "CLIP", "--vqa", "CLIP"], "answers no questions"),
        (["--characters", "/nowhere"], "0 folders"),
    ],
)
def test_models_that_do_not_serve(arguments, tmp_path, capsys, models, words):
    made = {}
    for name, make in (("CLIP", tiny.make_clip), ("VQA", tiny.make_blip)):
        if name in models:
            made[name] = str(make(tmp_path / name))
    assert command.main([*arguments, *(made.get(m, m) for m in models)]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in message and message.endswith(".") and not (tmp_path / "out").exists()
