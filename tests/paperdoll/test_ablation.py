"""Paper dolls through the public training door, and the ablation, at a few steps."""

import json

import pytest
import torch

pytest.importorskip("pyarrow")
pytest.importorskip("accelerate")
pytest.importorskip("tensorboard")

from retrieval_core.data.building import build_data_set
from retrieval_core.data.filtering import load_rules
from retrieval_core.network.controlnet import load
from retrieval_core.paperdoll import ablation, train_from_data_set
from retrieval_core.paperdoll.booru import make_booru
from retrieval_core.paperdoll.bundle import BASE_FILE, find_bundled
from retrieval_core.paperdoll.image_adapter import GRIDS, ImageAdapter
from retrieval_core.paperdoll.train_from_data_set import make_base


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data set of 160 posts, all annotated."""
    folder = tmp_path_factory.mktemp("dolls")
    make_booru(folder / "source", 160, annotated=1.0, held_out=False)
    build_data_set(
        [folder / "source" / "booru"],
        folder / "set",
        rules=load_rules(None),
        cache=folder / "annotations",
    )
    return folder


def list_arguments(folder, out, **changes):
    values = {
        "base": find_bundled(BASE_FILE), "data": folder / "set", "out": folder / out,
        "cache": folder / "latents", "size": 64, "targets": 2, "views": 1, "batch_size": 2,
        "steps": 2, "warmup_steps": 0, "learning_rate": 1e-3, "ema_decay": "none", "workers": 0,
        "token_budget": "none", "precision": "float32", "correspondence": 0.2, "part_weight": 1.0,
        "reconstruction": 0.3, "sheet_every": 2, **changes,
    }  # fmt: skip
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in values.items())
    return [text for pair in pairs for text in pair]


def test_the_door_trains_a_network_of_the_paper_dolls_from_a_data_set(folder):
    assert train_from_data_set.main(list_arguments(folder, "run")) == 0
    network = load(folder / "run" / "run.safetensors", "paperdoll")
    assert network.card.training["reconstruction"] == 0.3
    assert any(bool(site.zero_conv.weight.any()) for site in network.retrieval.values())
    assert network.decoder and (folder / "run" / "sheets" / "step-00000002.png").is_file()


def test_prompts_are_the_tags_that_the_text_encoder_knows():
    prompts = make_base(find_bundled(BASE_FILE)).prompts
    texts = ["1girl, red hair, waving, smile, t-shirt, night", "waving, smile, night", "", "figure"]
    one, other, empty, concept = prompts.encode(texts, [(64, 64)] * 4)[0]
    assert torch.equal(one, other)
    assert not torch.equal(one, empty) and not torch.equal(concept, empty)


def test_the_codec_takes_pixels_from_minus_one_to_one():
    base = make_base(find_bundled(BASE_FILE))
    black = base.vae.encode(-torch.ones(1, 3, 64, 64))
    torch.testing.assert_close(black, base.vae.vae.encode(torch.zeros(1, 3, 64, 64)))
    assert float(base.vae.decode(black).max()) < -0.9


@pytest.fixture
def unet():
    return make_base(find_bundled(BASE_FILE)).unet


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", GRIDS)
def test_an_adapter_of_dropped_references_is_the_base(unet, count):
    adapter = ImageAdapter(unet, count)
    x, at, context = draw(2, 24, 16, 16), torch.tensor([9, 700]), draw(2, 4, 64, seed=1)
    references, concepts = draw(4, 24, 16, 16, seed=2), draw(4, 4, 64, seed=3)
    used = torch.tensor([[False, False], [True, False]])
    tokens = adapter.embed(unet, references, concepts, used)
    assert tokens.shape == (2, 2 * count, 64)
    plain = unet(x, at, context)
    with adapter.attached(unet, tokens):
        found = unet(x, at, context)
    assert torch.equal(found[0], plain[0]) and not torch.allclose(found[1], plain[1], atol=1e-3)
    assert torch.equal(unet(x, at, context), plain)  # detached


def test_cross_attention_to_image_tokens_is_added_to_that_to_the_text(unet):
    """An adapter's keys and values start as the text's, so that the text as tokens counts twice."""
    adapter = ImageAdapter(unet, 4)
    layer = unet.middle_block[1].transformer_blocks[0].attn2
    x, context = draw(1, 16, layer.to_q.in_features), draw(1, 4, 64, seed=1)
    with torch.no_grad():
        once, bias = layer(x, context), layer.to_out[0].bias
        with adapter.attached(unet, context):
            twice = layer(x, context)
    torch.testing.assert_close(twice - bias, 2 * (once - bias))


def test_orders_are_compared_pair_by_pair():
    rows = {name: dict(zip(ablation.MEASURES, scores)) for name, scores in ablation.PAPER.items()}
    assert all("10 of 10" in line for line in ablation.compare_orders(rows))
    one, other = rows["recon"], rows["recon, lock both"]
    one["match"], other["match"] = other["match"], one["match"]
    first, *rest = ablation.compare_orders(rows)
    assert "10 of 10" not in first and "recon > recon, lock both" in first
    assert all("10 of 10" in line for line in rest)


def test_rows_are_trained_and_measured_once(folder, monkeypatch, capsys):
    few = {name: ablation.ROWS[name] for name in ("recon, lock both", "compose")}
    monkeypatch.setattr(ablation, "ROWS", few | {"recon": ablation.ROWS["recon"]})
    monkeypatch.setattr(ablation, "GRIDS", {4: 1})
    monkeypatch.setattr(ablation, "COUNT", 2)
    monkeypatch.setattr(ablation, "SEEDS_EACH", 2)
    monkeypatch.setattr(ablation, "PAPER", {n: ablation.PAPER[n] for n in few})
    given = list_arguments(folder, "ablation", sheet_every="none", checkpoint_every=1)
    assert ablation.main(given) == 0
    rows = {
        name: json.loads((folder / "ablation" / f"{file}.json").read_text())
        for name, file in (
            ("recon", "recon"), ("recon, lock both", "recon-lock-both"), ("compose", "compose"),
            ("adapter, 4 tokens", "adapter-4-tokens"),
        )
    }  # fmt: skip
    assert rows["adapter, 4 tokens"]["steps"] >= 2  # its step is the cheaper one
    assert all(0 <= row[m] <= 100 for row in rows.values() for m in ablation.MEASURES)
    trained = load(folder / "ablation" / "recon-lock-both" / "recon-lock-both.safetensors")
    assert trained.card.training["lock"] == "lock_both" and not trained.decoder
    shown = capsys.readouterr().out
    monkeypatch.setattr(ablation, "train", None)  # would fail
    monkeypatch.setattr(ablation, "prepare_adapter", None)
    assert ablation.main(given) == 0
    assert capsys.readouterr().out.strip() in shown
    assert ablation.main([*given, "--row", "compose", "--row", "recon"]) == 0
    *_, one, other = capsys.readouterr().out.splitlines()
    assert one in shown and one.startswith("compose ") and other.startswith("recon ")
