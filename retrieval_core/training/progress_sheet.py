"""Sheets of pictures that a network in training makes of fixed references and prompts."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..sampling.sampler import Denoise, sample
from ..sheets import Row, Tile, write_sheet
from .base_checkpoint import Base
from .latent_cache import LatentCache
from .paper_objective import PaperObjective
from .run_config import RunConfig
from .task_batches import Batch, TaskItems, collate_items
from .trainer import seed_generator

_PICTURES = 4
_STEPS = 20
_CFG = 5.0


class ProgressSheet:
    """Writes `sheets/step-<number>.png` into the run's folder.

    A row shows a target's references, the target and what the network makes of the references and
    the target's prompt, from the same noise on every sheet. The items are the first of the run,
    with prompts and references.
    """

    def __init__(self, config: RunConfig, base: Base, cache: LatentCache) -> None:
        shown = TaskItems(cache, replace(config, text_drop=0.0, reference_drop=0.0, targets=1))
        self.batch = collate_items([shown[i] for i in range(min(_PICTURES, len(shown)))])
        self.empty = cache.read_prompt(0)
        self.config, self.vae = config, base.vae

    def draw(self, objective: PaperObjective, step: int) -> None:
        """Samples with the weights as they are, and writes the sheet."""
        device = next(objective.parameters()).device
        batch = self.batch.to(device, torch.float32)
        latents = sample_batch(objective, batch, self.empty, self.config.seed)
        pictures, targets, references = (
            self._decode(t, device)
            for t in (latents, batch.latents, batch.reference_latents.flatten(0, 1))
        )
        self.vae.to("cpu")
        count = batch.used.shape[1]
        rows = [
            Row(
                f"{names[0]}",
                [Tile(one) for one in references[i * count : (i + 1) * count]],
                [Tile(targets[i], "target"), Tile(pictures[i], f"step {step}")],
            )
            for i, names in enumerate(batch.names)
        ]
        path = self.config.out / "sheets" / f"step-{step:08d}.png"
        write_sheet(path, self.config.out.resolve().name, f"step {step}", rows)

    def _decode(self, latents: Tensor, device: torch.device) -> Tensor:
        """Pictures [N, 3, H, W] in 0..1, one latent at a time."""
        self.vae.to(device)
        return torch.cat([self.vae.decode(one[None]).float().cpu() for one in latents]) / 2 + 0.5


def sample_batch(
    objective: PaperObjective, batch: Batch, empty: tuple[Tensor, Tensor | None], seed: int
) -> Tensor:
    """Latents [B, C, H, W] of a batch's prompts and references.

    Args:
        empty: context [L, D] and vector conditioning [A] of the empty prompt, for guidance.
    """
    noise = [
        torch.randn(x.shape, generator=seed_generator(seed, i)) for i, x in enumerate(batch.latents)
    ]
    with torch.no_grad():
        denoise = make_denoiser(objective, batch, empty)
        return sample(denoise, torch.stack(noise).to(batch.latents), objective.schedule, _STEPS)


def make_denoiser(
    objective: PaperObjective, batch: Batch, empty: tuple[Tensor, Tensor | None]
) -> Denoise:
    """x0 by classifier-free guidance; conditional rows retrieve at strength 1."""
    schedule, count = objective.schedule, len(batch.latents)
    sigmas, bank = schedule.sigmas(), objective.make_bank(batch)
    context, y = (None if t is None else t.to(batch.latents).expand(count, *t.shape) for t in empty)

    def denoise(x: Tensor, timestep: int) -> Tensor:
        sigma = sigmas[timestep]
        scaled = (x / (1 + sigma**2).sqrt()).to(x.dtype)
        steps = torch.full((count,), timestep)
        positive = objective.predict(scaled, steps, batch.context, batch.y, bank).float()
        negative = objective.predict(scaled, steps, context, y, None).float()
        prediction = negative + _CFG * (positive - negative)
        return schedule.denoised(prediction, x, sigma.expand(count))

    return denoise
