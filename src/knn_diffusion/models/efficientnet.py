"""EfficientNet-Lite0, a small network that has seen photographs: features of images for the encoder and for perceptual losses.

Inverted bottlenecks (Sandler et al. 2018) in the sizes of Tan and Le 2019; Lite has ReLU6 and no squeeze-and-excitation. Batch norms are
frozen: their statistics stay those of ImageNet, also while the weights learn, so that an image's features never depend on its batch.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from knn_diffusion.checkpoint import apply_weights, load_part, save_part
from knn_diffusion.config import config, require

KIND = "efficientnet"
NORM_EPS = 1e-3
PIXEL_SCALE, PIXEL_SHIFT = 127.5 / 128, 0.5 / 128
"""From [-1, 1] to what it was trained on: (level - 127) / 128 for levels 0 … 255."""

Pixels = Float[Tensor, "batch 3 height width"]
Map = Float[Tensor, "batch _ _ _"]
"""Channels, height and width change from layer to layer."""


@config
class Stage:
    """Blocks of one width in a row."""

    width: int
    """Channels that come out."""
    blocks: int
    """Inverted bottlenecks, ≥ 1; the first changes width and side."""
    kernel: int
    """Side of the depthwise convolutions, odd."""
    stride: int
    """The first block divides the side by this, 1 or 2."""
    expand: int = 6
    """Channels inside a block over those that go in."""

    def __post_init__(self) -> None:
        for name in ("width", "blocks", "expand"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.kernel % 2 == 1, "kernel", self.kernel, "odd")
        require(self.stride in (1, 2), "stride", self.stride, "1 or 2")


LITE0 = (
    Stage(width=16, blocks=1, kernel=3, stride=1, expand=1),
    Stage(width=24, blocks=2, kernel=3, stride=2),
    Stage(width=40, blocks=2, kernel=5, stride=2),
    Stage(width=80, blocks=3, kernel=3, stride=2),
    Stage(width=112, blocks=3, kernel=5, stride=1),
    Stage(width=192, blocks=4, kernel=5, stride=2),
    Stage(width=320, blocks=1, kernel=3, stride=1),
)


@config
class EfficientNetConfig:
    """Shape of the network; the defaults are Lite0 (3.4 million parameters, 73 MFLOP for an image of 96 pixels)."""

    stem_width: int = 32
    """Channels after the first convolution, which halves the side."""
    stages: tuple[Stage, ...] = LITE0
    """The bottlenecks, from fine to coarse."""
    width: int = 1280
    """Channels of the features."""

    def __post_init__(self) -> None:
        require(self.stem_width >= 1, "stem_width", self.stem_width, "at least 1")
        require(len(self.stages) >= 1, "stages", self.stages, "at least one")
        require(self.width >= 1, "width", self.width, "at least 1")

    @property
    def stride(self) -> int:
        """Pixels of one cell of the features."""
        total = 2
        for stage in self.stages:
            total *= stage.stride
        return total


class _Convolution(nn.Module):
    """A convolution without bias, then a frozen batch norm, computed as one: the norm scales the filters and adds a bias.

    Where the side is halved, the odd row and column of padding stand below and to the right, as in TensorFlow. On a CPU a
    depthwise convolution is computed in float32 under autocast too: its backward pass in bfloat16 takes four times as long.
    """

    def __init__(self, width_in: int, width: int, kernel: int = 1, stride: int = 1, *, depthwise: bool = False) -> None:
        super().__init__()
        self.stride, self.groups = stride, width_in if depthwise else 1
        total = kernel - stride
        self.padding = (total // 2, total - total // 2) * 2
        self.weight = nn.Parameter(torch.empty(width, width_in // self.groups, kernel, kernel))
        nn.init.kaiming_normal_(self.weight, mode="fan_out" if not depthwise else "fan_in")
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.mean: Tensor
        self.variance: Tensor

    def forward(self, x: Map) -> Map:
        scale = self.scale * (self.variance + NORM_EPS).rsqrt()
        weight, bias = self.weight * scale[:, None, None, None], self.shift - self.mean * scale
        if self.groups == 1 or x.device.type != "cpu":
            return self._convolve(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            return self._convolve(x.float(), weight, bias).to(x.dtype)

    def _convolve(self, x: Map, weight: Tensor, bias: Tensor) -> Map:
        if self.stride == 1:
            return F.conv2d(x, weight, bias, padding=self.padding[0], groups=self.groups)
        return F.conv2d(F.pad(x, self.padding), weight, bias, self.stride, groups=self.groups)


class _Block(nn.Module):
    """An inverted bottleneck: widen, filter each channel, narrow; beside it the identity where the shapes agree."""

    def __init__(self, width_in: int, stage: Stage, stride: int) -> None:
        super().__init__()
        inner = width_in * stage.expand
        self.expand = _Convolution(width_in, inner) if stage.expand > 1 else None
        self.depthwise = _Convolution(inner, inner, stage.kernel, stride, depthwise=True)
        self.project = _Convolution(inner, stage.width)
        self.residual = stride == 1 and width_in == stage.width

    def forward(self, x: Map) -> Map:
        inner = x if self.expand is None else F.relu6(self.expand(x))
        made = self.project(F.relu6(self.depthwise(inner)))
        return x + made if self.residual else made


class EfficientNet(nn.Module):
    """Pixels to a map of features, and to the maps on the way there."""

    def __init__(self, cfg: EfficientNetConfig) -> None:
        super().__init__()
        self.config = cfg
        self.stem = _Convolution(3, cfg.stem_width, 3, 2)
        stages: list[nn.Module] = []
        width = cfg.stem_width
        for stage in cfg.stages:
            blocks = [_Block(width, stage, stage.stride)]
            blocks += [_Block(stage.width, stage, 1) for _ in range(stage.blocks - 1)]
            stages.append(nn.Sequential(*blocks))
            width = stage.width
        self.blocks = nn.ModuleList(stages)
        self.head = _Convolution(width, cfg.width)

    def stages(self, pixels: Pixels, count: int | None = None) -> list[Map]:
        """The maps after the stem and after each stage, from fine to coarse.

        Args:
            pixels: in [-1, 1], sides that are multiples of `config.stride`.
            count: how many maps; those after them are not computed.
        """
        x = F.relu6(self.stem((pixels * PIXEL_SCALE + PIXEL_SHIFT).contiguous(memory_format=torch.channels_last)))
        maps = [x]
        for blocks in self.blocks[: len(self.blocks) if count is None else count - 1]:
            maps.append(x := blocks(x))
        return maps

    def features(self, pixels: Pixels) -> Map:
        """The last map, of `config.width` channels ≥ 0; arguments as of `stages`."""
        return F.relu6(self.head(self.stages(pixels)[-1]))


def save_backbone(folder: Path, network: EfficientNet, facts: dict[str, str]) -> None:
    """Write the network as a part folder, with facts on where its weights come from."""
    save_part(folder, kind=KIND, config=network.config, weights=network.state_dict(), extra=facts)


def load_backbone(folder: Path) -> EfficientNet:
    """Read what `save_backbone` wrote.

    Raises: CheckpointError when it is missing, damaged or of another kind.
    """
    part = load_part(folder, kind=KIND, config_class=EfficientNetConfig)
    with torch.random.fork_rng(devices=[]):
        network = EfficientNet(part.config)
    apply_weights(network, part.weights, str(folder))
    return network
