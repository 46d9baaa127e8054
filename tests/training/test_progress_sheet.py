"""Sheets of a run: whose weights they show, what scores they have, and that they change nothing."""

import torch
from tiny_models import make_clip, make_dino
from tiny_run import TinyBase, set_up, train

from retrieval_core.data import open_data_set
from retrieval_core.metrics.encoders import load_clip, load_dino
from retrieval_core.training import progress_sheet, training_run
from retrieval_core.training.single_device import SingleDevice


def test_sheets_show_the_averages_and_do_not_change_the_run(tmp_path, monkeypatch):
    name = "network.retrieval.middle.to_q.weight"
    draw, shown = training_run.ProgressSheet.draw, []

    def record(self, objective, step):
        shown.append(objective.state_dict()[name].clone())
        return draw(self, objective, step)

    monkeypatch.setattr(training_run.ProgressSheet, "draw", record)
    without = train(set_up(tmp_path / "without", ema_decay=0.5))
    tensors, state = train(set_up(tmp_path / "with", ema_decay=0.5, sheet_every=11))
    assert len(shown) == 2  # at steps 11 and 12
    assert torch.equal(shown[1], tensors[f"average.{name}"])
    assert not torch.equal(shown[1], tensors[f"weights.{name}"])
    assert state == without[1]
    for key, value in without[0].items():
        assert torch.equal(tensors[key], value), key


def test_pictures_are_decoded_and_scored_in_full_precision(tmp_path, monkeypatch):
    """In fp16, SDXL's VAE overflows."""
    config, base, seen = set_up(tmp_path, steps=1, precision="bf16", sheet_every=1), TinyBase(), []
    decode = base.vae.decode

    def record(latents):
        seen.append((torch.is_autocast_enabled("cpu"), latents.dtype))
        return decode(latents)

    base.vae.decode = record
    device = SingleDevice(torch.device("cpu"), config)
    training_run.train(config, base, device)
    assert set(seen) == {(False, torch.float32)}


def test_without_averages_sheets_show_the_weights(tmp_path, monkeypatch):
    shown = []

    def record(self, objective, step):
        shown.append({k: v.clone() for k, v in objective.state_dict().items()})
        return tmp_path, {}

    monkeypatch.setattr(training_run.ProgressSheet, "draw", record)
    tensors, _ = train(set_up(tmp_path, ema_decay=None, sheet_every=12))
    for key, value in shown[0].items():
        if f"weights.{key}" in tensors:
            assert torch.equal(tensors[f"weights.{key}"], value), key


def test_scores_are_the_mean_cosines_of_pictures_and_their_references(tmp_path, monkeypatch):
    folders = {"clip": make_clip(tmp_path / "clip"), "dino": make_dino(tmp_path / "dino")}
    config = set_up(tmp_path, **{name: str(folder) for name, folder in folders.items()})
    base = TinyBase()
    cache = training_run.plan_cache(open_data_set(config.data), base, config)
    training_run.fill_cache(cache, base)
    written = []
    monkeypatch.setattr(progress_sheet, "write_sheet", lambda *given: written.append(given))
    objective = training_run.make_objective(config, base)
    path, scores = progress_sheet.ProgressSheet(config, base, cache).draw(objective, 7)
    assert path == config.out / "sheets" / "step-00000007.png"
    rows = written[0][-1]
    for kind, encoder in (
        ("CLIP-I", load_clip(folders["clip"])),
        ("DINO-I", load_dino(folders["dino"])),
    ):
        each = []
        for row in rows:
            made, *given = (
                torch.nn.functional.normalize(encoder.embed_images(tile.picture[None]).double())[0]
                for tile in (row.results[1], *row.references)
            )
            each.append(100 * sum(float(made @ one) for one in given) / len(given))
            assert f"{kind} {each[-1]:.1f}" in row.results[1].caption
        assert abs(scores[kind] - sum(each) / len(each)) < 1e-3
    clip, texts = load_clip(folders["clip"]), []
    images = cache.data_set.index["image"].to_pylist()
    for row in rows:
        prompt = f"tag {images.index(row.title)}"
        a, b = clip.embed_images(row.results[1].picture[None]), clip.embed_texts([prompt])
        texts.append(100 * float(torch.cosine_similarity(a.double(), b.double())))
        assert f"CLIP-T {texts[-1]:.1f}" in row.results[1].caption
    assert abs(scores["CLIP-T"] - sum(texts) / len(texts)) < 1e-3


def test_scores_are_logged_beside_the_losses(tmp_path, monkeypatch):
    logged = []
    config = set_up(tmp_path, steps=2, sheet_every=2, dino=str(make_dino(tmp_path / "dino")))
    accelerator = training_run.make_accelerator(config)
    monkeypatch.setattr(accelerator, "log", lambda values, step: logged.append((step, values)))
    training_run.train(config, TinyBase(), accelerator)
    assert [step for step, values in logged if "DINO-I" in values] == [2]
