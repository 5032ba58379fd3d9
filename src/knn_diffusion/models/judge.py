"""The judge: a classifier of rendered stickers that says which concept and which background colour a picture shows.

It is an instrument of measurement, trained on renders of its own and never used for conditioning, so its opinion of a
generated picture is independent of everything the generator has seen. Its penultimate features are the space in which the
Fréchet distance of an evaluation is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from knn_diffusion import images
from knn_diffusion.checkpoint import apply_weights, load_part, save_part, weights_digest
from knn_diffusion.config import config, require

KIND = "judge"


@config
class JudgeConfig:
    """What the judge tells apart, and its size; the default is 2.0 M parameters."""

    concepts: tuple[str, ...]
    """Every concept of the sticker world, held-out ones too; the position is the class."""
    colours: tuple[str, ...]
    """Background colours; the position is the class."""
    size: int = 64
    """Height and width of the pictures it looks at, in pixels; a multiple of 16."""
    widths: tuple[int, int, int] = (48, 96, 256)
    """Channels at 1/4, 1/8 and 1/16 of the size; the last is the width of the features."""
    depths: tuple[int, int, int] = (1, 2, 2)
    """Residual convolutions at each of the three scales."""

    def __post_init__(self) -> None:
        require(len(self.concepts) >= 2, "concepts", len(self.concepts), "at least two names")
        require(len(self.colours) >= 2, "colours", len(self.colours), "at least two names")
        require(self.size >= 16 and self.size % 16 == 0, "size", self.size, "a positive multiple of 16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the judge says about a batch: unnormalised log-probabilities, and the features behind them."""

    concept: Float[Tensor, "batch concepts"]
    colour: Float[Tensor, "batch colours"]
    features: Float[Tensor, "batch channels"]


class Judge(nn.Module):
    """A small residual convolutional network with two linear heads on one pooled feature vector."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        self.config = config
        stem = config.widths[0] * 2 // 3
        layers: list[nn.Module] = [nn.Conv2d(3, stem, 4, stride=2, padding=1), nn.ReLU()]
        channels = stem
        for width, depth in zip(config.widths, config.depths, strict=True):
            layers.append(_Shrink(channels, width))
            layers += [_Residual(width) for _ in range(depth)]
            channels = width
        self.body = nn.Sequential(*layers, nn.BatchNorm2d(channels), nn.ReLU())
        self.concept_head = nn.Linear(channels, len(config.concepts))
        self.colour_head = nn.Linear(channels, len(config.colours))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def features(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch channels"]:
        """The pooled features before the heads; pixels in [-1, 1], of the configured size."""
        return self.body(pixels.contiguous(memory_format=torch.channels_last)).mean((2, 3))

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Verdict:
        """Judge pictures: pixels in [-1, 1], of the configured size."""
        features = self.features(pixels)
        return Verdict(concept=self.concept_head(features), colour=self.colour_head(features), features=features)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """Verdicts on a list of pictures as float64 arrays, one row a picture."""

    concept: Float[np.ndarray, "items concepts"]
    colour: Float[np.ndarray, "items colours"]
    features: Float[np.ndarray, "items channels"]


@torch.inference_mode()
def judge_images(judge: Judge, pictures: Sequence[Image.Image], *, batch_size: int = 64) -> Judgement:
    """Judge pictures of any size: each is cropped square and shrunk to the judge's size by the package's one resize."""
    was_training = judge.training
    judge.eval()
    device = next(judge.parameters()).device
    rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, len(pictures), batch_size):
        squares = [images.square(picture, judge.config.size) for picture in pictures[start : start + batch_size]]
        pixels = images.pixels_from_uint8(np.stack([images.to_array(square) for square in squares])).to(device)
        verdict = judge(pixels)
        rows.append(tuple(t.double().cpu().numpy() for t in (verdict.concept, verdict.colour, verdict.features)))  # type: ignore[arg-type]
    judge.train(was_training)
    concept, colour, features = (np.concatenate(column) for column in zip(*rows, strict=True))
    return Judgement(concept=concept, colour=colour, features=features)


def save_judge(judge: Judge, folder: Path, extra: dict[str, object] | None = None) -> None:
    """Write the judge as a part folder, its weights in half precision (under 5 MB at the default size)."""
    weights = {name: _half(tensor) for name, tensor in judge.state_dict().items()}
    save_part(folder, kind=KIND, config=judge.config, weights=weights, extra=extra)


def load_judge(folder: Path) -> Judge:
    """Read a judge, in float32 and evaluation mode.

    Raises: CheckpointError when the folder holds no sound judge.
    """
    part = load_part(folder, kind=KIND, config_class=JudgeConfig)
    judge = Judge(part.config)
    weights = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in part.weights.items()}
    apply_weights(judge, weights, str(folder))
    return judge.eval()


def judge_digest(judge: Judge) -> str:
    """Sixteen hexadecimal digits that name these weights in a report: distances of two judges are never comparable."""
    return weights_digest({name: _half(tensor) for name, tensor in judge.state_dict().items()})[:16]


class _Shrink(nn.Module):
    """Normalise, then halve height and width."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x))


class _Residual(nn.Module):
    """x + conv(relu(norm(x))): at this size a second convolution in each block buys less than a second block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(functional.relu(self.norm(x)))


def _half(tensor: Tensor) -> Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor
