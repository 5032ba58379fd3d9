"""The seam between this package and any image tokenizer: one protocol, and what every tokenizer refuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from knn_diffusion.errors import UsageError
from knn_diffusion.shapes import Tokens

Pixels = Float[Tensor, "batch image_channels height width"]
"""RGB in [-1, 1], or RGBA as `images.pixels_from_uint8` makes it."""


@runtime_checkable
class Tokenizer(Protocol):
    """Images to grids of codes and back: a network whose `encode` and `decode` are deterministic.

    [MASK] is no code; it belongs to the diffusion.
    """

    @property
    def config(self) -> Any:
        """What it is stored with; has an `image_size`, the side of its square images in pixels."""

    @property
    def alpha(self) -> bool:
        """True if its pixels have alpha as a fourth channel."""

    @property
    def vocab_size(self) -> int:
        """Number of codes, V."""

    @property
    def grid(self) -> int:
        """Side of the token grid."""

    @property
    def codes(self) -> Float[Tensor, "vocab code_dim"]:
        """The vector of each code."""

    def encode(self, pixels: Pixels) -> Tokens:
        """Tokens of images in [-1, 1], grid rows first. Raises: UsageError when the images are of another size."""

    def decode(self, tokens: Tokens) -> Pixels:
        """Images in [-1, 1]. Raises: UsageError when the grid has another size or a token is no code."""

    def to(self, device: torch.device) -> Tokenizer:
        """Work on that device; returns itself."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Its weights, of which the first tells the device."""

    def state_dict(self) -> dict[str, Any]:
        """Its weights by name."""


def check_pixels(pixels: Pixels, size: int, channels: int = 3) -> None:
    """Raise a UsageError unless these are images of this size and number of channels."""
    if pixels.ndim != 4 or pixels.shape[1:] != (channels, size, size):
        raise UsageError(
            f"expected images [batch, {channels}, {size}, {size}], got {list(pixels.shape)}: resize them with images.square first"
        )


def check_tokens(tokens: Tokens, grid: int, vocab_size: int) -> None:
    """Raise a UsageError unless these are grids of codes."""
    if tokens.ndim != 2 or tokens.shape[1] != grid**2:
        raise UsageError(
            f"expected tokens [batch, {grid**2}], got {list(tokens.shape)}: use this tokenizer's own tokens"
        )
    low, high = (int(tokens.min()), int(tokens.max())) if tokens.numel() else (0, 0)
    if low < 0 or high >= vocab_size:
        raise UsageError(f"expected tokens in [0, {vocab_size}), got {low} … {high}: denoise every [MASK] first")
