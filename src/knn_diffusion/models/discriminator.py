"""The critic of the image tokenizer: a PatchGAN, which judges overlapping squares of an image (Isola et al. 2017)."""

from __future__ import annotations

import itertools

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class PatchDiscriminator(nn.Module):
    """Logits of "this square is real", one for each square, by strided convolutions.

    Group normalisation keeps the images of a batch apart, so that real and drawn ones can be judged together.
    """

    def __init__(self, channels: int = 32, stages: int = 3) -> None:
        super().__init__()
        widths = [channels * min(2**stage, 8) for stage in range(stages)]
        self.first = nn.Conv2d(3, widths[0], 4, stride=2, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(narrow, wide, 4, stride=2, padding=1, bias=False), nn.GroupNorm(wide // 8, wide))
            for narrow, wide in itertools.pairwise(widths)
        )
        self.last = nn.Conv2d(widths[-1], 1, 3, padding=1)

    def forward(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch 1 rows columns"], list[Tensor]]:
        """The logits, and the features of every stage, finest first."""
        features = [functional.leaky_relu(self.first(pixels), 0.2)]
        for stage in self.stages:
            features.append(functional.leaky_relu(stage(features[-1]), 0.2))
        return self.last(features[-1]), features
