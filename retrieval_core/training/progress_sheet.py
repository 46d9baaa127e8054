"""Sheets of pictures that a network in training makes of fixed references and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..metrics.encoders import load_clip, load_dino
from ..metrics.model_folder import find_model
from ..metrics.protocols import ImageEmbedder
from ..metrics.similarity import embed_references, similarity, text_similarity
from ..sampling.sampler import Denoise, sample
from ..sheets import Row, Tile, write_sheet
from .base_checkpoint import Base
from .latent_cache import LatentCache
from .paper_objective import PaperObjective, seed_generator
from .run_config import RunConfig
from .task_batches import Batch, TaskItems, collate_items

_PICTURES = 4
_STEPS = 20
_CFG = 5.0


class ProgressSheet:
    """Writes `sheets/step-<number>.png` into the run's folder.

    A row shows a target's references, the target and what the network makes of the references and
    the target's prompt, from the same noise on every sheet. The items are the first of the run,
    with prompts and references. Where the settings name a CLIP or DINO model, each picture has its
    CLIP-I or DINO-I, the mean cosine similarity to its references, and with CLIP its CLIP-T, the
    one to its prompt, in percent.
    """

    def __init__(self, config: RunConfig, base: Base, cache: LatentCache) -> None:
        shown = TaskItems(cache, replace(config, text_drop=0.0, reference_drop=0.0, targets=1))
        numbers = range(min(_PICTURES, len(shown)))
        self.batch = collate_items([shown[i] for i in numbers])
        self.prompts = [cache.texts[cache.prompts[shown.find_target(i)]] for i in numbers]
        self.empty = cache.read_prompt(0)
        self.config, self.vae = config, base.vae
        self.encoders: dict[str, ImageEmbedder] = {}
        if config.clip is not None:
            self.encoders["CLIP-I"] = load_clip(find_model(config.clip))
        if config.dino is not None:
            self.encoders["DINO-I"] = load_dino(find_model(config.dino))

    def draw(self, objective: PaperObjective, step: int) -> tuple[Path, dict[str, float]]:
        """Samples with the weights as they are, and writes the sheet.

        Returns:
            The sheet's file, and the mean of each score over the pictures.
        """
        device = next(objective.parameters()).device
        batch = self.batch.to(device, torch.float32)
        latents = sample_batch(objective, batch, self.empty, self.config.seed)
        # In full precision: in float16 SDXL's VAE overflows.
        with torch.autocast(device.type, enabled=False):
            pictures, targets, references = (
                self._decode(t, device)
                for t in (latents, batch.latents, batch.reference_latents.flatten(0, 1))
            )
            self.vae.to("cpu")
            groups = references.split(batch.used.shape[1])
            scores = self._score(pictures, groups)
        rows = []
        for i, (names, shown) in enumerate(zip(batch.names, groups)):
            told = [f"{name} {values[i]:.1f}" for name, values in scores.items()]
            made = Tile(pictures[i], ", ".join(told) or f"step {step}")
            rows.append(Row(names[0], [Tile(r) for r in shown], [Tile(targets[i], "target"), made]))
        path = self.config.out / "sheets" / f"step-{step:08d}.png"
        weights = "" if self.config.ema_decay is None else ", averaged weights"
        write_sheet(path, self.config.out.resolve().name, f"step {step}{weights}", rows)
        return path, {name: sum(values) / len(values) for name, values in scores.items()}

    def _score(self, pictures: Tensor, groups: Sequence[Tensor]) -> dict[str, list[float]]:
        """Each score of each picture; groups: the pictures' references."""
        scores = {
            name: [
                similarity(encoder.embed_images(one[None]), embed_references(shown, encoder)).item()
                for one, shown in zip(pictures, groups)
            ]
            for name, encoder in self.encoders.items()
        }
        if "CLIP-I" in self.encoders:
            clip = self.encoders["CLIP-I"]
            scores["CLIP-T"] = text_similarity(pictures, self.prompts, clip).values.tolist()
        return scores

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
