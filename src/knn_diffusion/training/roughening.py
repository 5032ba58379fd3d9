"""Pictures made worse on purpose, as a tokenizer makes them, so that a judge grades what they show and not their grain."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

Pixels = Float[Tensor, "batch 3 height width"]
"""Colours in [-1, 1]; height and width divide by 8."""


def wobble(pixels: Pixels, generator: torch.Generator) -> Pixels:
    """Each picture mirrored half of the time, shifted and scaled by up to 8 %: more renders from the same scenes."""
    n = len(pixels)
    draw = torch.rand(n, 4, generator=generator)
    scale = 0.92 + 0.16 * draw[:, 0]
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = scale * torch.where(draw[:, 1] < 0.5, -1.0, 1.0)
    theta[:, 1, 1] = scale
    theta[:, :, 2] = 0.16 * (draw[:, 2:] - 0.5)
    grid = functional.affine_grid(theta, list(pixels.shape), align_corners=False)
    return functional.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)


def roughen(pixels: Pixels, generator: torch.Generator) -> Pixels:
    """What a tokenizer may do to a picture, done to about half of them: blur, blocky re-encoding, noise, shifted tones."""
    order = torch.randperm(len(pixels), generator=generator)
    rough = pixels.clone()
    blurred, blocky, noisy, _ = order.tensor_split(4)
    rough[blurred] = _shrunk_and_grown(rough[blurred], generator)
    rough[blocky] = _requantised(rough[blocky], generator)
    noise = torch.randn(rough[noisy].shape, generator=generator)
    rough[noisy] = rough[noisy] + 0.12 * torch.rand(len(noisy), 1, 1, 1, generator=generator) * noise
    tone = torch.rand(len(pixels), 2, 1, 1, 1, generator=generator) - 0.5
    return (rough * (1 + 0.15 * tone[:, 0]) + 0.1 * tone[:, 1]).clamp(-1, 1)


def _shrunk_and_grown(pixels: Pixels, generator: torch.Generator) -> Pixels:
    """Blur by way of a smaller picture, one factor for the group."""
    size = pixels.shape[-1]
    small = int(torch.randint(size * 3 // 8, size * 7 // 8, (1,), generator=generator))
    reduced = functional.interpolate(pixels, size=(small, small), mode="bilinear", antialias=True)
    return functional.interpolate(reduced, size=(size, size), mode="bilinear")


def _requantised(pixels: Pixels, generator: torch.Generator) -> Pixels:
    """Round the cosine coefficients of 8 × 8 blocks, high frequencies more coarsely, as JPEG does."""
    n, c, height, width = pixels.shape
    k = torch.arange(8.0)
    basis = torch.cos(torch.pi * (2 * k[None] + 1) * k[:, None] / 16) * 0.5
    basis[0] *= 0.5**0.5
    blocks = pixels.reshape(n, c, height // 8, 8, width // 8, 8).transpose(3, 4)
    step = (0.05 + 0.05 * (k[:, None] + k[None])) * (0.3 + 1.7 * torch.rand(n, 1, 1, 1, 1, 1, generator=generator))
    coefficients = ((basis @ blocks @ basis.T) / step).round() * step
    return (basis.T @ coefficients @ basis).transpose(3, 4).reshape(pixels.shape)
