"""The measured variants: a MODEL with its conditionings, and the operations that it adds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from retrieval_core.bank.encoding import select_tokens
from retrieval_core.bank.tokens import MATCHED
from retrieval_core.network.unet import SD15, UNetConfig
from retrieval_core.training_free.attention_layers import list_self_attention_layers
from retrieval_core.training_free.training_free_network import name_site

from . import arithmetic, external
from .hosting import randomise

MASKED_SHARE = 0.4
ROWS = {"both": 2, "cond": 1}
FULL, MASKED, BUDGET = "full", "masked", "budget"
_POOLED = 1280  # width of SDXL's pooled text


@dataclass(frozen=True)
class Run:
    """A MODEL and its two conditionings, ready for the host's sampler.

    added: operations that the variant must add to a step of two rows, None if not counted.
    bank_bytes: size of its banks on the device.
    """

    model: Any
    positive: list
    negative: list
    added: int | None = 0
    bank_bytes: int = 0


@dataclass(frozen=True)
class Variant:
    """One line of the table.

    key: matched by --only. make: builds the run, untimed. external: of another pack.
    """

    key: str
    title: str
    make: Callable[[], Run]
    external: bool = False


def conditioning(seed: int, config: UNetConfig) -> list:
    generator = torch.Generator().manual_seed(seed)
    width, more = config.context_dim, {}
    if config.adm_in_channels is not None:
        more = {"pooled_output": torch.randn(1, _POOLED, generator=generator)}
    return [[torch.randn(1, arithmetic.TEXT_TOKENS, width, generator=generator), more]]


class Workbench:
    """The base model, both modes of retrieval on it, and all variants of them at one size.

    Args:
        model: the host's MODEL. config: its U-Net's shape.
        size: height and width of the picture in pixels.
    """

    def __init__(self, model: Any, config: UNetConfig, size: int):
        self.model, self.config, self.size = model, config, size
        self.latent = size // 8
        self.positive = conditioning(1, config)
        self.negative = conditioning(2, config)
        self._references: dict[tuple[str, int, bool], Any] = {}

    @cached_property
    def network(self) -> Any:
        """A retrieval network managed by the host, in the dtypes that the host would choose."""
        from retrieval_pack.nodes.host import attention, loading, trained_network
        from retrieval_pack.nodes.host.base_model import detect_base
        from retrieval_pack.retrieval_core.network.controlnet import Card, RetrievalControlNet

        count = sum(p.numel() for p in self.model.model.diffusion_model.parameters())
        base = detect_base(self.model).name
        weights, compute = loading.choose_types(base, torch.float16, count)
        made = RetrievalControlNet(
            self.config,
            Card(base),
            operations=loading.OPERATIONS,
            attend=attention.attend,
            dtype=weights,
        )
        randomise(made.retrieval)
        latent_format = self.model.get_model_object("latent_format")
        return trained_network.manage_network("benchmark", made, latent_format, compute, "")

    @cached_property
    def training_free(self) -> Any:
        """The training-free mode at one noise level: a step uses the nearest level's bank only."""
        from retrieval_pack.nodes.host.training_free_model import use_training_free

        return use_training_free(self.model, levels=1)

    def mask(self) -> Tensor:
        """A centred upright rectangle of `MASKED_SHARE` of the picture, as a figure covers it."""
        mask = torch.zeros(self.size, self.size)
        height = round(self.size * 0.8)
        width = round(self.size * MASKED_SHARE * self.size / height)
        top, left = (self.size - height) // 2, (self.size - width) // 2
        mask[top : top + height, left : left + width] = 1
        return mask

    def _make_references(
        self,
        mode: str,
        network: Any,
        sites: Mapping[str, tuple[int, int]],
        count: int,
        masked: bool,
    ) -> Any:
        """References of true shape, cached; noise, since the time does not depend on the values.

        Args:
            sites: site -> (width, latent pixels that a token spans along an edge).
        """
        key = mode, count, masked
        if key in self._references:
            return self._references[key]
        from retrieval_pack.nodes.host.encoded_references import References
        from retrieval_pack.retrieval_core.bank.tokens import EncodedReference

        generator, kinds = torch.Generator().manual_seed(3), len(network.maker.kinds)
        features = {}
        for site, (width, factor) in sites.items():
            edge = -(-self.latent // factor)
            tokens = edge**2
            if masked and not site.startswith(MATCHED):
                tokens = int(select_tokens(self.mask(), edge, edge).sum())
            features[site] = torch.randn(kinds, tokens, width, generator=generator)
        reference = EncodedReference(features, latent_size=(self.latent, self.latent))
        self._references[key] = References(network, (reference,) * count)
        return self._references[key]

    def _controls(self, what: str) -> Any:
        from retrieval_pack.retrieval_core.sampling.controls import Controls

        return Controls() if what == BUDGET else Controls(token_budget=None)

    def trained(self, count: int, what: str, rows: str) -> Run:
        """The trained mode with `count` references. rows: "both" or "cond"."""
        from retrieval_pack.nodes.host.apply import apply_references

        references, controls = self.references(count, what == MASKED), self._controls(what)
        model = apply_references(self.model, references, 1.0, guidance=rows, controls=controls)
        added, size = self._measure_last_application(model, ROWS[rows])
        return Run(model, self.positive, self.negative, added, size)

    def regions(self, apart: bool) -> Run:
        """Two applications of 4 references, each in its half of the picture, on both rows.

        apart: each position's self-attention is limited to the half of the positions in its region.
        """
        from retrieval_pack.nodes.host.apply import apply_references
        from retrieval_pack.retrieval_core.sampling.controls import Controls

        model, added, size = self.model, 0, 0
        references, controls = self.references(4), Controls(apart=float(apart))
        left = torch.zeros(self.size, self.size)
        left[:, : self.size // 2] = 1
        for region in (left, 1 - left):
            model = apply_references(
                model, references, 1.0, guidance="both", region=region, controls=controls
            )
            here = self._measure_last_application(model, 2)
            added, size = added + here[0], size + here[1]
        if apart:
            layers = self._list_layers().items()
            shapes = {name: (count, width, count // 2) for name, (count, width) in layers}
            added -= arithmetic.self_attention_operations(shapes, 2)
        return Run(model, self.positive, self.negative, added, size)

    def _list_layers(self) -> dict[str, tuple[int, int]]:
        """Self-attention layer -> (positions, width)."""
        return {
            name: ((-(-self.latent // layer.downsampling)) ** 2, layer.width)
            for name, layer in list_self_attention_layers(self.config).items()
        }

    def references(self, count: int, masked: bool = False) -> Any:
        """References of the trained mode."""
        factors = self.config.site_downsampling()
        sites = {s: (width, factors[s]) for s, width in self.config.site_channels().items()}
        return self._make_references("trained", self.network, sites, count, masked)

    def _measure_last_application(self, model: Any, rows: int) -> tuple[int, int]:
        """Operations and bytes of the model's last application."""
        applied = model.model_options["transformer_options"]["patches"]["output_block_patch"][-1]
        bank = applied.retrieval.bank
        tokens = {site: one.keys.shape[1] for site, one in bank.sites.items()}
        pooling = applied.retrieval.sites["input_0"].pool
        added = arithmetic.trained_operations(
            self.config, rows, self.latent, self.latent, tokens, pooling
        )
        return added, bank.nbytes()

    def without_training(self, count: int, what: str, rows: str) -> Run:
        """The training-free mode's default, as `trained`: the decoder's self-attention layers
        attend to the references, and one is matched; `rows` does not concern the match."""
        from retrieval_pack.nodes.host.apply import apply_references

        network = self.training_free
        (level,), names = network.network.timesteps(), network.network.names
        factors = network.network.site_downsampling()
        sites = {s: (width, factors[s]) for s, width in network.network.site_channels().items()}
        masked = what == MASKED
        references = self._make_references("training-free", network, sites, count, masked)
        controls = self._controls(what)
        model = apply_references(self.model, references, 1.0, guidance=rows, controls=controls)
        bank = references.bank(controls.token_budget)
        shapes, positions = {}, self._list_layers()
        for name in names:
            tokens = bank.sites[name_site(name, level)].keys.shape[1]
            shapes[name] = (*positions[name], tokens)
        added = arithmetic.self_attention_operations(shapes, ROWS[rows])
        matched, (count, width) = (
            bank.sites[name_site(MATCHED, level)],
            positions[network.network.match_layer],
        )
        tokens, values = matched.values.shape[1:]
        added += arithmetic.match_operations(1, count, width, values, tokens)
        return Run(model, self.positive, self.negative, added, bank.nbytes())

    def controlnet(self) -> Run:
        """The host's own ControlNet of the base's architecture, on both rows."""
        # The host's `nodes` is a module, the pack's a folder inside the pack.
        import comfy.cldm.cldm
        import comfy.controlnet
        import comfy.model_management as management
        import comfy.ops

        from nodes import ControlNetApplyAdvanced

        left_out = ("out_channels", "disable_unet_model_creation", "dtype", "device")
        settings = self.model.model.model_config.unet_config.items()
        dtype = self.model.model.get_dtype()
        made = comfy.cldm.cldm.ControlNet(
            **{name: value for name, value in settings if name not in left_out},
            hint_channels=3,
            dtype=dtype,
            operations=comfy.ops.manual_cast,
            device=management.unet_offload_device(),
        )
        randomise(made)
        net = comfy.controlnet.ControlNet(
            made, load_device=management.get_torch_device(), manual_cast_dtype=dtype
        )
        hint = torch.rand(1, self.size, self.size, 3, generator=torch.Generator().manual_seed(4))
        positive, negative = ControlNetApplyAdvanced().apply_controlnet(
            self.positive, self.negative, net, hint, 1.0, 0.0, 1.0
        )
        added = arithmetic.controlnet_operations(self.config, 2, self.latent, self.latent)
        return Run(self.model, positive, negative, added)

    def ip_adapter(self, count: int) -> Run:
        """IP-Adapter Plus with `count` pictures, in the checkout that the environment names."""
        model = external.ip_adapter_plus(self.model, count)
        layers = self._list_layers().items()  # cross-attention has the same positions
        shapes = {name: (*layer, 16 * count) for name, layer in layers}
        added = arithmetic.self_attention_operations(shapes, 2)
        return Run(model, self.positive, self.negative, added)

    def reference_mode(self) -> Run:
        """Advanced-ControlNet's reference attention, in the checkout that the environment names."""
        generator = torch.Generator().manual_seed(7)
        latent = torch.randn(1, 4, self.latent, self.latent, generator=generator)
        positive, negative = external.reference_only(self.positive, self.negative, [latent])
        return Run(self.model, positive, negative, None)


def variants(bench: Workbench, counts: Sequence[int]) -> list[Variant]:
    """All variants in the order of the table."""
    titles = {
        FULL: "full",
        MASKED: f"masks of {MASKED_SHARE:.0%}",
        BUDGET: "default token budget",
    }
    found = []
    for mode, make in (("trained", bench.trained), ("training-free", bench.without_training)):
        for rows in ROWS:
            for what, title in titles.items():
                for count in counts:
                    found.append(
                        Variant(
                            f"{mode}-{count}-{what}-{rows}",
                            f"{mode}, {count} reference{'s' * (count > 1)}, {title}, {rows} rows",
                            lambda f=make, c=count, w=what, r=rows: f(c, w, r),
                        )
                    )
    for apart in (False, True):
        found.append(
            Variant(
                f"regions{'-apart' * apart}",
                f"trained, two regions of 4 references, budget{', kept apart' * apart}, both rows",
                lambda a=apart: bench.regions(a),
            )
        )
    found.append(Variant("controlnet", "ControlNet (the host's own)", bench.controlnet))
    if bench.config == SD15 and external.checkout(external.IP_ADAPTER) is not None:
        for count in counts:
            found.append(
                Variant(
                    f"ip-adapter-plus-{count}",
                    f"IP-Adapter Plus, {count} picture{'s' * (count > 1)}, both rows",
                    lambda c=count: bench.ip_adapter(c),
                    True,
                )
            )
    if external.checkout(external.ADVANCED_CONTROLNET) is not None:
        found.append(
            Variant(
                "advanced-controlnet",
                "Advanced-ControlNet, reference attention, 1 picture",
                bench.reference_mode,
                True,
            )
        )
    return found
