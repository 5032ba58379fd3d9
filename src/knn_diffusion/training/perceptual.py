"""What makes two images look alike beyond their pixels: losses over features that are fixed, not trained.

Differs from the paper: its tokenizer compares features of a pretrained VGG (LPIPS). `FeaturePerception` does the same over
a backbone that the user has; the others need no weights. The seam is any module `(drawn, real) -> scalar`.
"""

from __future__ import annotations

import itertools
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from knn_diffusion.models.efficientnet import EfficientNet

Pixels = Float[Tensor, "batch 3 height width"]
PerceptualName = Literal["none", "edges", "random"]


class NoPerception(nn.Module):
    """Always zero."""

    def forward(self, drawn: Pixels, real: Pixels) -> Float[Tensor, ""]:
        """Zero."""
        return drawn.new_zeros(())


class EdgePerception(nn.Module):
    """Mean absolute difference of horizontal and vertical gradients over an average-pooled pyramid.

    L1 alone is content with a blurred contour; its gradient then is wrong on both sides, which this counts.
    """

    def __init__(self, scales: int = 3) -> None:
        super().__init__()
        self.scales = scales

    def forward(self, drawn: Pixels, real: Pixels) -> Float[Tensor, ""]:
        """Sum over scales of the gradients' mean absolute difference."""
        difference = drawn - real  # gradients and pooling are linear, so one difference serves all scales
        total = drawn.new_zeros(())
        for scale in range(self.scales):
            if scale:
                difference = functional.avg_pool2d(difference, 2)
            total = total + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
        return total


class RandomPerception(nn.Module):
    """Distance of channel-normalised features of a convolutional network that stays as it was drawn from a seed."""

    def __init__(self, channels: int = 32, stages: int = 3, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        widths = [3, *(channels * 2**stage for stage in range(stages))]
        for stage, (narrow, wide) in enumerate(itertools.pairwise(widths)):
            weight = torch.randn(wide, narrow, 3, 3, generator=generator) / (narrow * 9 / 2) ** 0.5
            self.register_buffer(f"weight_{stage}", weight - weight.mean((1, 2, 3), keepdim=True), persistent=False)

    def forward(self, drawn: Pixels, real: Pixels) -> Float[Tensor, ""]:
        """Sum over stages of the squared distance between unit feature vectors, averaged over places."""
        x, y = drawn, real
        total = drawn.new_zeros(())
        for stage, weight in enumerate(self.buffers()):
            x, y = (functional.relu(functional.conv2d(z, weight, padding=1, stride=1 + (stage > 0))) for z in (x, y))
            total = total + _unit_distance(x, y)
        return total


class FeaturePerception(nn.Module):
    """Squared distance of channel-normalised features of a pretrained backbone, summed over its first maps (LPIPS, Zhang et al. 2018).

    Differs from LPIPS: every channel counts the same, since there are no human judgements to weigh them by.
    """

    def __init__(self, backbone: EfficientNet, maps: int = 5) -> None:
        super().__init__()
        self.backbone, self.maps = backbone.eval().requires_grad_(False), maps

    def forward(self, drawn: Pixels, real: Pixels) -> Float[Tensor, ""]:
        """Mean over places, summed over maps."""
        with torch.no_grad():
            wanted = self.backbone.stages(real, self.maps)
        seen = self.backbone.stages(drawn, self.maps)
        return torch.stack([_unit_distance(a, b) for a, b in zip(seen, wanted, strict=True)]).sum()


def _unit_distance(
    a: Float[Tensor, "batch features rows columns"], b: Float[Tensor, "batch features rows columns"]
) -> Float[Tensor, ""]:
    """Mean over places of the squared distance between unit feature vectors."""
    return (functional.normalize(a.float(), dim=1) - functional.normalize(b.float(), dim=1)).square().sum(1).mean()


PERCEPTIONS: dict[PerceptualName, type[nn.Module]] = {
    "none": NoPerception,
    "edges": EdgePerception,
    "random": RandomPerception,
}
