"""Regions kept apart in the host's self-attention, in both modes."""

from __future__ import annotations

import pytest
import torch
from making import TINY_SD15, checkpoint, conditioning, encoded, loaded, model_from, noise, sample
from retrieval_pack.nodes.host import step_context
from retrieval_pack.nodes.host.apply import apply_references
from retrieval_pack.nodes.host.attention import attend
from retrieval_pack.nodes.host.self_attention import JointAttention
from retrieval_pack.nodes.host.training_free_model import use_training_free
from retrieval_pack.nodes.retrieval_controls import LIMITED, RetrievalControls
from retrieval_pack.retrieval_core.errors import RetrievalError
from retrieval_pack.retrieval_core.sampling.controls import Controls

APART, TOGETHER = Controls(token_budget=None, apart=1.0), Controls(token_budget=None)


@pytest.fixture(scope="module")
def model():
    return model_from(checkpoint(TINY_SD15))


@pytest.fixture(scope="module", params=["trained", "training-free"])
def net(request, model, tmp_path_factory):
    if request.param == "training-free":
        return use_training_free(model)
    return loaded(tmp_path_factory.mktemp("net"), model, TINY_SD15, "sd15")


@pytest.fixture(scope="module")
def characters(net):
    with torch.inference_mode():
        return encoded(net, 1), encoded(net, 1, seed=21)


def half(left: bool, size: int = 64) -> torch.Tensor:
    mask = torch.zeros(1, size, size)
    mask[..., : size // 2] = 1
    return mask if left else 1 - mask


def applied(model, characters, controls, strengths=(1.0, 1.0)):
    for refs, left, strength in zip(characters, (True, False), strengths):
        model = apply_references(model, refs, strength, region=half(left), controls=controls)
    return model


def replacements(model) -> set[JointAttention]:
    held = model.model_options["transformer_options"].get("patches_replace", {}).get("attn1", {})
    return {value for value in held.values() if isinstance(value, JointAttention)}


def extra_of(model, sigma=1.0, areas=None, uuids=None):
    sampling = model.get_model_object("model_sampling")
    noted = step_context.StepContext(
        sampling, torch.full((1,), sigma), (8, 8), areas or {}, frozenset({1})
    )
    return {
        "block": ("input", 1), "block_index": 0, "n_heads": 8, "dim_head": 40,
        "activations_shape": [2, 320, 8, 8], "cond_or_uncond": [0, 1], step_context.STEP: noted,
        "uuids": uuids or ["a", "b"],
    }  # fmt: skip


def test_a_region_does_not_see_the_other_ones_tokens(model, characters):
    (kept,) = replacements(applied(model, characters, APART))
    q, k, v = (noise(2, 64, 320, seed=i) for i in range(3))
    left = half(True, 8)[0].flatten() == 1
    other = torch.where(left[None, :, None], v, noise(2, 64, 320, seed=9))
    extra = extra_of(model)
    one, two = kept(q, k, v, extra), kept(q, k, other, extra)
    assert torch.equal(one[:, left], two[:, left])
    assert not torch.equal(one[:, ~left], two[:, ~left])
    kept.cleanup()


def test_the_picture_changes_and_only_with_two_regions_that_act(model, characters):
    together, apart = (sample(applied(model, characters, c)) for c in (TOGETHER, APART))
    assert apart.isfinite().all() and not torch.allclose(together, apart)
    assert torch.equal(sample(applied(model, characters, APART)), apart)
    for only in ((1.0, 0.0), (0.0, 1.0)):
        one, same = (sample(applied(model, characters, c, only)) for c in (TOGETHER, APART))
        assert torch.equal(one, same)
    assert torch.equal(sample(applied(model, characters, APART, (0.0, 0.0))), sample(model))


def test_one_that_is_not_kept_apart_is_not_counted(model, characters):
    first = apply_references(model, characters[0], 1.0, region=half(True), controls=APART)
    mixed = apply_references(first, characters[1], 1.0, region=half(False), controls=TOGETHER)
    assert torch.equal(sample(mixed), sample(applied(model, characters, TOGETHER)))


def test_it_ends_at_its_part_of_sampling(model, characters):
    early = Controls(token_budget=None, apart=0.5)
    (kept,) = replacements(applied(model, characters, early))
    sampling = model.get_model_object("model_sampling")
    q = noise(2, 64, 320)
    for percent, acts in ((0.1, True), (0.5, True), (0.6, False)):
        extra = extra_of(model, float(sampling.percent_to_sigma(percent)))
        assert all((part is not None) == acts for part in kept._find_partitions(q, extra))
    kept.cleanup()


def test_areas_of_the_prompt_cut_the_regions_with_them(model, characters):
    """A crop that holds one region only has nothing to keep apart; the chunks differ then."""
    (kept,) = replacements(applied(model, characters, APART))
    q = noise(2, 64, 320)
    cropped, whole = kept._find_partitions(q, extra_of(model, areas={"a": (8, 4, 0, 0)}))
    assert cropped is None and whole is not None
    k, v = noise(2, 64, 320, seed=1), noise(2, 64, 320, seed=2)
    found = kept(q, k, v, extra_of(model, areas={"a": (8, 4, 0, 0)}))
    whole = kept(q, k, v, extra_of(model))
    torch.testing.assert_close(found[1], whole[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], whole[0])
    area = conditioning(10, area=(8, 4, 0, 0))
    left = sample(applied(model, characters, APART), positive=area)
    assert left.isfinite().all()


def test_what_it_holds_is_dropped_after_sampling(model, characters):
    patched = applied(model, characters, APART)
    (kept,) = replacements(patched)
    seen = []

    def look(h, hsp, to):
        seen.append(len(kept._partitions))
        return h, hsp

    patched.set_model_output_block_patch(look)
    sample(patched)
    assert max(seen) > 0 and not kept._partitions


def test_other_packs_layers_keep_the_last_word(model, characters):
    calls = []

    def replaced(q, k, v, extra):
        calls.append(len(q))
        return attend(q, k, v, extra["n_heads"]) * 1.5

    others = model.clone()
    others.set_model_attn1_replace(replaced, "middle", 0, 0)
    assert sample(applied(others, characters, APART)).isfinite().all()
    assert calls


def test_the_node_sets_it_and_refuses_nonsense():
    def made(**more):
        rest = ("constant", "1, 1", "all", 1.0, 1.0, 1.0, 0.0, LIMITED, 512)
        return RetrievalControls.execute(*rest, **more).args[0]

    assert made().apart == 0.0 and made(keep_apart=0.4).apart == 0.4
    with pytest.raises(RetrievalError, match="2 of sampling"):
        made(keep_apart=2.0)
