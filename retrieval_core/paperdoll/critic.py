"""The critic's loss: predicted latents must show the attributes that the references show.

This goes past the paper, as identity losses of later methods do. Retrieved values may determine a
hair style long before the decoder draws it: at high noise, where shapes are decided, the diffusion
loss gains little from drawing it. The critic, a classifier of latents that is trained beforehand
and then frozen, classifies the clean latent of each prediction, and its cross entropy is added.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NOISE = 0.5  # largest noise level added to latents before they are classified
_WIDTHS = (64, 64, 128, 160)


class Critic(nn.Module):
    """Logits of every attribute for clean latents [B, C, H, W], H and W multiples of 4.

    Args:
        channels: C. size: H = W.
        sizes: attribute -> (label of its part, number of its values), as for `AttributeReader`.
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
        """Mean cross entropy over attributes, of latents with noise added.

        The noise keeps a generator from satisfying the critic with imperceptible patterns.

        Args:
            latents: [B, C, H, W]. values: [B, A], in the order of `sizes`.
            generator: draws the noise.
            found: bool [B, P], the parts that the references show; attributes of other parts do
                not count. None: all count.
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
    """Imitates predictions at high noise, which average over undecided content.

    Half of the latents [B, C, H, W] are blended with `others`, which have the same attributes in
    other scenes; all are blurred a little and scaled towards 0, the mean of all latents.
    """
    rows = (len(latents), 1, 1, 1)

    def uniform() -> Tensor:
        return torch.rand(rows, generator=generator, device=generator.device).to(latents)

    latents = torch.lerp(latents, others, 0.6 * uniform() * (uniform() < 0.5))
    blurred = F.avg_pool2d(latents, 3, stride=1, padding=1, count_include_pad=False)
    return torch.lerp(latents, blurred, uniform() ** 2) * (1 - 0.5 * uniform())
