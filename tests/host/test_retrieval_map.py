"""Record Retrieval Map and Retrieval Map in the host."""

from __future__ import annotations

import base64

import pytest
import torch
from dolls import Dolls
from making import images
from retrieval_pack.nodes.host import skip_patch
from retrieval_pack.nodes.host.apply import apply_references
from retrieval_pack.nodes.record_retrieval_map import RetrievalRecordMap
from retrieval_pack.nodes.retrieval_map import SHARES, STRONGEST, RetrievalMap
from retrieval_pack.retrieval_core.paperdoll.model import CONFIG as PAPERDOLL
from retrieval_pack.retrieval_core.sampling.applications import Retrieval
from retrieval_pack.retrieval_core.sampling.attention_map import choose_map_site
from retrieval_pack.retrieval_core.sampling.controls import Controls


@pytest.fixture(scope="module")
def dolls(tmp_path_factory):
    with torch.inference_mode():
        return Dolls(tmp_path_factory.mktemp("dolls"))


@pytest.fixture(scope="module")
def refs(dolls):
    with torch.inference_mode():
        return dolls.references(3)


def half(left: bool, size: int = 64) -> torch.Tensor:
    region = torch.zeros(1, size, size)
    region[..., : size // 2] = float(left)
    region[..., size // 2 :] = float(not left)
    return region


def test_recording_leaves_the_picture_as_it_is_and_costs_one_site(dolls, refs, monkeypatch):
    patched = apply_references(dolls.model, refs, 1.0)
    plain = dolls.sample(patched, rows=2)
    calls = []
    measure = skip_patch.measure_shares
    monkeypatch.setattr(
        skip_patch, "measure_shares", lambda *a: (calls.append(a[2].shape), measure(*a))[1]
    )
    recording, _ = RetrievalRecordMap.execute(patched).args
    assert torch.equal(dolls.sample(recording, rows=2), plain)
    # One site of 8x8 positions, its conditional rows only, once a step.
    assert [tuple(shape) for shape in calls] == [(2, 128, 8, 8)] * 3
    assert torch.equal(dolls.sample(patched, rows=2), plain) and len(calls) == 3


def test_the_shares_are_the_attention_of_each_row_to_each_reference(dolls, refs, monkeypatch):
    """Against the site's attention weights at every step, gathered from what the patch is given."""
    given = []
    original = Retrieval.add_retrieved

    def spy(self, site, h, rows, strength):
        if site == choose_map_site(PAPERDOLL):
            layer, bank = self.sites[site], self.bank.sites[site]
            part = h.chunk(len(rows))[rows.index(0)]
            tokens = part.flatten(2).transpose(1, 2)
            normed = torch.nn.functional.layer_norm(tokens, tokens.shape[2:], *layer.norm)
            query = (normed @ layer.to_q.T).double()
            heads = [t.double().unflatten(-1, (layer.heads, -1)) for t in (query, bank.keys[0])]
            dim = heads[0].shape[-1]
            logits = torch.einsum("bqhd,khd->bhqk", *heads) / dim**0.5 + bank.bias.double()
            weights = logits.softmax(-1).mean(1)
            sums = [weights[..., bank.owner == i].sum(-1) for i in range(-1, 3)]
            given.append(torch.stack(sums, 1).unflatten(2, (8, 8)))
        return original(self, site, h, rows, strength)

    monkeypatch.setattr(Retrieval, "add_retrieved", spy)
    heavy = type(refs)(refs.network, (refs.encoded[0].with_weight(2.0), *refs.encoded[1:]))
    recording, recorded = RetrievalRecordMap.execute(apply_references(dolls.model, heavy, 1.0)).args
    dolls.sample(recording, rows=2)
    expected = torch.stack(given).mean(0)
    torch.testing.assert_close(recorded.shares().double(), expected, rtol=1e-4, atol=1e-5)
    assert not expected[0].allclose(expected[1], atol=1e-3)


def test_a_budget_does_not_blur_the_map(dolls, refs):
    maps = []
    for controls in (None, Controls(token_budget=8)):
        patched = apply_references(dolls.model, refs, 0.001, controls=controls)
        recording, recorded = RetrievalRecordMap.execute(patched).args
        dolls.sample(recording)
        maps.append(recorded.shares())
    torch.testing.assert_close(*maps, rtol=1e-2, atol=1e-3)


def test_two_regions_show_two_characters(dolls, refs):
    other = dolls.references(2, seed=9)
    patched = apply_references(dolls.model, refs, 1.0, region=half(True))
    patched = apply_references(patched, other, 1.0, region=half(False))
    recording, recorded = RetrievalRecordMap.execute(patched).args
    dolls.sample(recording)
    shares = recorded.shares()
    assert shares.shape == (1, 1 + 3 + 2, 8, 8)
    torch.testing.assert_close(shares.sum(1), torch.ones(1, 8, 8))
    assert float(shares[:, 1:4, :, 5:].max()) == 0.0 and float(shares[:, 4:, :, :3].max()) == 0.0
    assert float(shares[:, 1:4, :, :3].sum(1).min()) > 0.1
    assert float(shares[:, 4:, :, 5:].sum(1).min()) > 0.1


def test_areas_are_laid_where_they_belong(dolls, refs):
    """A prompt for the right half only: elsewhere nothing was looked at."""
    patched = apply_references(dolls.model, refs, 1.0)
    recording, recorded = RetrievalRecordMap.execute(patched).args
    dolls.sample(recording, positive=dolls.text("standing", area=(16, 8, 0, 8)))
    shares = recorded.shares()
    assert shares.shape == (1, 4, 8, 8)
    assert float(shares[:, 1:, :, :4].max()) == 0.0
    assert torch.equal(shares[:, 0, :, :4], torch.ones(1, 8, 4))
    assert float(shares[:, 1:, :, 4:].sum(1).min()) > 0.1


def test_split_batches_give_the_same_map(dolls, refs, monkeypatch):
    recording, recorded = RetrievalRecordMap.execute(apply_references(dolls.model, refs, 1.0)).args
    dolls.sample(recording, rows=2)
    whole = recorded.shares()
    monkeypatch.setattr(type(dolls.model.model), "memory_required", lambda *_, **__: 1e30)
    dolls.sample(recording, rows=2)
    torch.testing.assert_close(recorded.shares(), whole, rtol=1e-4, atol=1e-5)


def test_a_cached_map_holds_the_last_run(dolls, refs):
    """The host keeps the node's output: the next run of the sampler starts the map anew."""
    recording, recorded = RetrievalRecordMap.execute(apply_references(dolls.model, refs, 1.0)).args
    dolls.sample(recording, rows=3)
    dolls.sample(recording, rows=1, steps=2)
    once = recorded.shares()
    assert len(once) == 1
    dolls.sample(recording, rows=1, steps=2)
    assert torch.equal(recorded.shares(), once)
    clone = recording.clone()  # as nodes behind it make
    dolls.sample(clone, rows=2, steps=2)
    assert len(recorded.shares()) == 2


def test_two_recorders_on_one_model(dolls, refs):
    first, one = RetrievalRecordMap.execute(apply_references(dolls.model, refs, 1.0)).args
    second, two = RetrievalRecordMap.execute(first).args
    dolls.sample(second)
    assert torch.equal(one.shares(), two.shares())


def test_overlay_and_masks(dolls, refs):
    recording, recorded = RetrievalRecordMap.execute(
        apply_references(dolls.model, refs, 1.0, region=half(True))
    ).args
    dolls.sample(recording, rows=2)
    shown = images(2, 48)
    overlay, masks = RetrievalMap.execute(recorded, shown, SHARES, 0).args
    assert overlay.shape == (2, 48, 48, 3) and masks.shape == (2 * 3, 48, 48)
    assert 0 <= float(masks.min()) and float(masks.max()) <= 1
    # Picture by picture, and reference by reference within each.
    shares = recorded.shares()
    means = masks.unflatten(0, (2, 3)).mean((2, 3))
    torch.testing.assert_close(means, shares[:, 1:].mean((2, 3)), rtol=0.05, atol=0.01)
    (_, second) = RetrievalMap.execute(recorded, shown, SHARES, 2).args
    assert torch.equal(second, masks[1::3])
    (_, hard) = RetrievalMap.execute(recorded, shown, STRONGEST, 0).args
    hard = hard.unflatten(0, (2, 3))
    assert set(hard.unique().tolist()) <= {0.0, 1.0} and float(hard.sum(1).max()) == 1.0
    assert float(hard[..., 36:].max()) == 0.0  # outside the region nothing was retrieved
    inside, soft = hard.sum(1) > 0, masks.unflatten(0, (2, 3))
    assert inside.any()
    assert torch.equal((soft * hard).sum(1)[inside], soft.amax(1)[inside])


def test_the_page_is_told_the_shares_of_each_reference(dolls, refs):
    other = dolls.references(1, seed=9, concept="face", weight=0.5)
    patched = apply_references(dolls.model, refs, 1.0, region=half(True))
    patched = apply_references(patched, other, 1.0, region=half(False))
    recording, recorded = RetrievalRecordMap.execute(patched).args
    dolls.sample(recording, rows=2)
    (told,) = RetrievalMap.execute(recorded, images(2, 48), SHARES, 0).ui["retrieval_map"]
    assert len(told["pictures"]) == 2
    assert [(one["concept"], one["weight"]) for one in told["references"]] == [
        *[(one.concept, one.weight) for one in refs.encoded], ("face", 0.5)
    ]  # fmt: skip
    shares = recorded.shares()
    read = torch.frombuffer(bytearray(base64.b64decode(told["shares"])), dtype=torch.uint8)
    read = read.view(2, 5, told["height"], told["width"]).float() / 255
    torch.testing.assert_close(read, shares, rtol=0, atol=0.5 / 255 + 1e-6)
    # What is recorded keeps no tokens alive.
    assert not any(one.tokens for one in recorded.references())


@pytest.mark.parametrize(
    ("strength", "settings"),
    [
        (0.0, {}),
        (1.0, {"start": 0.98, "end": 0.99}),
        (1.0, {"controls": Controls(groups=(1.0, 0.0, 1.0))}),
    ],
    ids=["strength 0", "no step", "site switched off"],
)
def test_where_no_reference_acts_the_map_is_empty_and_no_run_is_refused(
    dolls, refs, strength, settings
):
    patched = apply_references(dolls.model, refs, strength, **settings)
    recording, recorded = RetrievalRecordMap.execute(patched).args
    shown = images(1, 32)
    with pytest.raises(ValueError, match="No sampler has filled") as caught:
        RetrievalMap.execute(recorded, shown, SHARES, 0)
    assert str(caught.value).endswith(".") and ". " not in str(caught.value)
    dolls.sample(recording)
    out = RetrievalMap.execute(recorded, shown, SHARES, 0)
    overlay, masks = out.args
    assert out.ui["retrieval_map"][0]["references"] == []
    assert out.ui["retrieval_map"][0]["shares"] == ""
    assert float(masks.max()) == 0.0 and masks.shape == (1, 32, 32)
    assert torch.equal(overlay[..., 0], overlay[..., 1])


@pytest.mark.parametrize(
    ("count", "reference", "words"), [(2, 0, "1 pictures and 2 were given"), (1, 4, "there are 3")]
)
def test_other_pictures_and_references_are_refused(dolls, refs, count, reference, words):
    recording, recorded = RetrievalRecordMap.execute(apply_references(dolls.model, refs, 1.0)).args
    dolls.sample(recording, steps=1)
    with pytest.raises(ValueError) as caught:
        RetrievalMap.execute(recorded, images(count, 32), SHARES, reference)
    assert words in str(caught.value) and ". " not in str(caught.value)


def test_the_training_free_mode_is_mapped_too(dolls):
    from retrieval_pack.nodes.host import encoded_references as references
    from retrieval_pack.nodes.host.training_free_model import use_training_free

    network = use_training_free(dolls.model, "all", 2)
    made = references.encode_references(network, images(2), dolls.vae, dolls.clip, "face", size=64)
    refs = references.References(network, made)
    patched = apply_references(dolls.model, refs, 1.0, region=half(True))
    plain = dolls.sample(patched, rows=2)
    recording, recorded = RetrievalRecordMap.execute(patched).args
    assert torch.equal(dolls.sample(recording, rows=2), plain)
    shares = recorded.shares()
    assert shares.shape == (2, 3, 8, 8)
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 8, 8))
    assert float(shares[:, 1:, :, 5:].max()) == 0.0
    assert float(shares[:, 1:, :, :3].min()) > 0.0
    everywhere = apply_references(dolls.model, refs, 1.0)
    recording, recorded = RetrievalRecordMap.execute(everywhere).args
    dolls.sample(recording, positive=dolls.text("standing", area=(16, 8, 0, 8)))
    shares = recorded.shares()
    assert shares.shape == (1, 3, 8, 8)
    assert float(shares[:, 1:, :, :4].max()) == 0.0 and float(shares[:, 1:, :, 4:].min()) > 0.0
