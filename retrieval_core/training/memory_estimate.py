"""Estimates the memory that a run needs on its device, from shapes alone, before it starts.

One training step runs on fake tensors, which have shapes and no values, and the memory of all that
is alive is added up. CUDA's autocast is imitated, so that the estimate needs no GPU; its fused
attention, which never stores the attention matrix, too.
"""

from __future__ import annotations

import importlib.util
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..bank.site_bank import Bank, SiteBank, make_network_bank
from ..bank.token_budget import choose_budgets
from ..bank.tokens import SiteTokens, Tokens
from ..errors import RetrievalError
from ..network.controlnet import Card, RetrievalControlNet
from ..network.unet import UNet, UNetConfig
from ..sampling.noise_schedule import NoiseSchedule
from .correspondence import correspondence_loss
from .latent_cache import GIB, LABELS
from .paper_objective import HALF, PaperObjective
from .run_config import RunConfig

# An allowance for workspaces of cuDNN and cuBLAS and for memory lost between allocations.
WORKSPACE = GIB
_STATE = {"adamw": 8, "adamw-fused": 8, "adamw-8bit": 2}  # bytes of a trained value
_CONTEXT = 77  # tokens of a prompt
_PARTS = 16  # labels of a data set, about
_RANK = 16  # suggested to who has too little memory


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process needs; the cache of latents is mapped from disk and needs none.

    Attributes:
        weights: frozen ones in the precision of the pass, trained ones in float32.
        gradients, optimizer: of the trained weights.
        activations: whatever else is alive at the peak of a step.
        average: in main memory, not on the device.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    average: int
    workspace: int = WORKSPACE

    @property
    def device(self) -> int:
        """All bytes on the device."""
        parts = self.weights, self.gradients, self.optimizer, self.activations, self.workspace
        return sum(parts)

    def describe(self) -> str:
        """One line with all parts in GiB."""
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimiser": self.optimizer,
            "activations": self.activations,
            "workspace": self.workspace,
        }
        listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
        return (
            f"Memory on the device: {self.device / GIB:.1f} GiB ({listed}); in main memory "
            f"{self.average / GIB:.1f} GiB for the average."
        )


def estimate_memory(
    config: RunConfig, unet_config: UNetConfig, name: str, world: int = 1
) -> MemoryEstimate:
    """The memory of a run on a base of a given shape and name (`controlnet.BASES`).

    It takes seconds.

    Args:
        world: number of processes, which share the optimiser's state (ZeRO, stage 1).
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        network = RetrievalControlNet(
            unet_config, Card(name), attend=attend_fused, query_pooling=config.query_pooling
        )
        blank = None
        if unet_config.in_channels > unet_config.out_channels:  # an inpainting base
            blank = torch.zeros(1, unet_config.out_channels, config.size // 8, config.size // 8)
        objective = PaperObjective(
            network, UNet(unet_config, attend=attend_fused), NoiseSchedule(), config, blank
        )
        parameters = list(objective.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        if config.precision in HALF:
            imitate_autocast(objective, HALF[config.precision])
        stored = []
        if config.accumulate > 1:  # a later pass begins with the gradients of those before it
            for parameter in parameters:
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
                    stored.append(parameter.grad)
        with LiveMemory([*parameters, *stored]) as memory:
            rehearse_step(objective, config)
        gradients = 4 * trained
        peak = memory.peak + (gradients if stored else 0)
        # The step of AdamW, not fused, has one more copy of its weights.
        stepping = 2 * gradients if config.optimizer == "adamw" else gradients
        return MemoryEstimate(
            weights=sum(p.numel() * p.element_size() for p in parameters),
            gradients=gradients,
            optimizer=_STATE[config.optimizer] * trained // world,
            activations=max(peak, stepping) - gradients,
            average=0 if config.ema_decay is None else 4 * trained,
        )


def check_memory(
    config: RunConfig, unet_config: UNetConfig, name: str, free: int, world: int = 1
) -> str:
    """One line on the memory that each of `world` processes needs on a device with `free` bytes.

    Raises:
        RetrievalError: it does not fit; names the setting that would save most.
    """
    needed = estimate_memory(config, unet_config, name, world)
    if needed.device <= free:
        return needed.describe()
    totals = {
        words: estimate_memory(replace(config, **changes), unet_config, name, world).device
        for words, changes in _list_savings(config).items()
    }
    problem = (
        f"These settings need about {needed.device / GIB:.1f} GiB on the device, of which "
        f"{free / GIB:.1f} GiB are free"
    )
    best = min(totals, key=totals.__getitem__, default=None)
    if best is None or totals[best] >= needed.device:
        size = config.name_setting("size")
        raise RetrievalError(f"{problem}; use a larger device, or a smaller {size} or base.")
    raise RetrievalError(
        f"{problem}; {best} would save most and need {totals[best] / GIB:.1f} GiB."
    )


def _list_savings(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Changes that save memory, by the words that recommend them."""
    savings: dict[str, dict[str, Any]] = {}
    if not config.checkpoint_activations:
        name = config.name_setting("checkpoint_activations")
        savings[f"{name} = true"] = {"checkpoint_activations": True}
    if config.batch_size > 1:
        passes = config.batch_size * config.accumulate
        savings[f"batch_size = 1 with accumulate = {passes}"] = {
            "batch_size": 1, "accumulate": passes,
        }  # fmt: skip
    if config.rank is None and config.lock != "lock_both":
        savings[f"rank = {_RANK}"] = {"rank": _RANK}
    optimizer = config.name_setting("optimizer")
    if optimizer and config.optimizer != "adamw-8bit" and importlib.util.find_spec("bitsandbytes"):
        savings[f"{optimizer} = 'adamw-8bit'"] = {"optimizer": "adamw-8bit"}
    return savings


def rehearse_step(objective: PaperObjective, config: RunConfig) -> None:
    """Forward and backward pass of one step on zeros, with all terms of the loss that cost much.

    The gradients stay.
    """
    shape, edge = objective.unet.config, config.size // 8
    batch, references, sites = config.batch_size, config.references, objective.network.retrieval
    latents = torch.zeros(batch * config.targets, shape.out_channels, edge, edge)
    context = torch.zeros(len(latents), _CONTEXT, shape.context_dim)
    y = None if shape.adm_in_channels is None else torch.zeros(len(latents), shape.adm_in_channels)

    def repeat(values: Tensor) -> Tensor:
        return values[:: config.targets].repeat_interleave(references, 0)

    features = objective.network.encode_features(
        repeat(latents), repeat(context), None if y is None else repeat(y)
    )
    tokens = {
        site: found.reshape(batch, 1, -1, found.shape[3]) for site, (found, _) in features.items()
    }
    budgets = choose_budgets(config.token_budget, shape.site_downsampling(), (edge, edge))
    merged = {}
    for site, layer in sites.items():
        # In place of merged tokens, which depend on values, the first ones.
        kept = layer.norm_reference(tokens[site][:, 0])[:, : budgets[site]]
        owner = torch.zeros(kept.shape[1], dtype=torch.long)
        merged[site] = SiteBank(layer.to_k(kept), layer.to_v(kept), None, owner)
    bank, still = Bank(merged, references), torch.zeros(len(latents))
    emb, seen = objective.encode(latents, still, context, y)
    loss = objective.decode(seen, emb, context, bank).float().square().mean()
    if config.correspondence:
        owner = torch.zeros(0, dtype=torch.long)
        given = {site: SiteTokens(found, None, owner) for site, found in tokens.items()}
        whole = make_network_bank(objective.network, Tokens(given, references, (edge, edge)))
        parts, shown = (
            torch.zeros(len(given), LABELS * edge, LABELS * edge, dtype=torch.uint8)
            for given in (latents, repeat(latents))
        )
        generator = torch.Generator()
        loss = loss + correspondence_loss(sites, seen, whole, parts, shown, _PARTS, generator)
    if objective.reader is not None:
        _, clean = objective.encode(latents, still, context, y)
        loss = loss + objective.reader.loss(sites, seen, clean, bank, latents[:, :1])
    loss.backward()


class LiveMemory(TorchDispatchMode):
    """Adds up the storages of tensors made inside the `with` block while they are alive.

    `peak`: the most bytes alive at one time. known: tensors that are not to be counted.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._sizes[storage._cdata] = storage.nbytes()
                    self.alive += storage.nbytes()
                    self.peak = max(self.peak, self.alive)
                    weakref.finalize(storage, self._forget, storage._cdata)
        return made

    def _forget(self, key: int) -> None:
        self.alive -= self._sizes.pop(key)


class _CastInputs(TorchFunctionMode):
    """Casts the inputs of functions, weights included, to a type each."""

    def __init__(self, types: Mapping[Callable[..., Any], torch.dtype]) -> None:
        super().__init__()
        self.types = types

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        dtype = self.types.get(func)

        def cast(value: Any) -> Any:
            return value.to(dtype) if dtype and isinstance(value, Tensor) else value

        return func(*map(cast, args), **{name: cast(v) for name, v in (kwargs or {}).items()})


def imitate_autocast(module: nn.Module, half: torch.dtype) -> None:
    """Lets layers compute in the types that CUDA's autocast chooses: norms in float32.

    Layer by layer, because a function mode is off in the backward pass, which recomputes some.
    """
    types = {
        F.linear: half,
        F.conv2d: half,
        F.group_norm: torch.float32,
        F.layer_norm: torch.float32,
    }
    mode = _CastInputs(types)

    def run(forward: Callable[..., Tensor], *args: Tensor) -> Tensor:
        with mode:
            return forward(*args)

    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)):
            layer.forward = partial(run, layer.forward)


class _FusedAttention(torch.autograd.Function):
    """What the fused kernel stores for its backward pass: inputs, output, a sum for each query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        out = torch.empty_like(q)
        sums = torch.empty(len(q), heads, q.shape[1])
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def attend_fused(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """An attention function that only allocates, as the fused kernel does."""
    return _FusedAttention.apply(q, k, v, heads)
