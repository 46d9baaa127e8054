"""The critic: while training, the picture being drawn must show what the references show.

This goes past the paper, as identity losses of later methods do. What is retrieved may tell a hair
style long before the decoder draws it: at high noise, where shapes are decided, the diffusion loss
gains little from them. A classifier of latents, trained beforehand and then fixed, reads the
attributes off the clean latent that each prediction amounts to, and its cross entropy is added.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NOISE = 0.5  # most noise that a latent is read through
_WIDTHS = (64, 64, 128, 160)


class Critic(nn.Module):
    """Logits of every attribute for clean latents [B, C, H, W], H and W multiples of 4.

    Args:
        channels: C. size: H = W.
        sizes: attribute -> (part that it belongs to, number of its values), as the
            `AttributeReader` takes them.
    """

    def __init__(self, channels: int, size: int, sizes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.parts = [part for part, _ in sizes.values()]
        layers: list[nn.Module] = []
        for before, after, stride in zip((channels, *_WIDTHS), _WIDTHS, (1, 2, 1, 2)):
            layers += [nn.Conv2d(before, after, 3, padding=1, stride=stride, bias=False)]
            layers += [nn.GroupNorm(8, after), nn.SiLU()]
        features = _WIDTHS[-1] * (size // 4) ** 2
        self.features = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, 192), nn.SiLU())
        self.heads = nn.ModuleList(nn.Linear(192, count) for _, count in sizes.values())

    def forward(self, latents: Tensor) -> list[Tensor]:
        features = self.features(latents)
        return [head(features) for head in self.heads]

    def loss(
        self,
        latents: Tensor,
        values: Tensor,
        generator: torch.Generator,
        found: Tensor | None = None,
    ) -> Tensor:
        """Mean cross entropy over attributes, read through noise.

        The noise is what keeps a generator from pleasing the critic with imperceptible patterns.

        Args:
            latents: [B, C, H, W]. values: [B, A], in the order of `sizes`.
            generator: draws the noise.
            found: bool [B, P], the parts that the references show; attributes of others do not
                count. None: all do.
        """
        device = generator.device
        level = NOISE * torch.rand(len(latents), 1, 1, 1, generator=generator, device=device)
        noise = torch.randn(latents.shape, generator=generator, device=device)
        losses = []
        for i, logits in enumerate(self(latents + (level * noise).to(latents))):
            each = F.cross_entropy(logits, values[:, i], reduction="none")
            weight = torch.ones_like(each) if found is None else found[:, self.parts[i]].to(each)
            losses.append((each * weight).sum() / weight.sum().clamp_min(1))
        return torch.stack(losses).mean()


def blur_undecided(latents: Tensor, others: Tensor, generator: torch.Generator) -> Tensor:
    """Latents [B, C, H, W] as predictions at high noise are: means over what is not yet decided.

    Half of them are blended with `others`, of the same attributes but drawn in other scenes; all
    are blurred a little and drawn towards 0, the mean of all latents.
    """
    rows = (len(latents), 1, 1, 1)

    def uniform() -> Tensor:
        return torch.rand(rows, generator=generator, device=generator.device).to(latents)

    latents = torch.lerp(latents, others, 0.6 * uniform() * (uniform() < 0.5))
    blurred = F.avg_pool2d(latents, 3, stride=1, padding=1, count_include_pad=False)
    return torch.lerp(latents, blurred, uniform() ** 2) * (1 - 0.5 * uniform())
