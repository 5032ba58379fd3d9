"""How an image is drawn, as far as it is known before the denoiser is asked: the settings, and the passes that follow from them.

`ancestral` is the paper's chain: each token is unmasked by chance, at any stride. `halton` fixes which tokens are unmasked, so
that few steps spread them well; what is drawn there is the same posterior. `confidence` draws every masked token from that
posterior too, but keeps the draws with the highest probability and draws the others anew (MaskGIT): likely codes are kept more
often than they are drawn, so that images are tidier and less various than the posterior's, and more so with less noise.
All orders give the denoiser the step whose masked share the tokens have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from knn_diffusion.config import config, require
from knn_diffusion.diffusion.process import Schedule, uniform
from knn_diffusion.diffusion.step import Order, Pass

GUIDANCE_POWER = 3.0
"""Exponent of the power-cosine guidance schedule: nearly unguided for the first third (1d-tokenizer's choice)."""


@config
class SamplerConfig:
    """How an image is drawn; the defaults are for few steps, `paper()` is Algorithm 2 as printed."""

    num_steps: int = 16
    """Passes through the denoiser, 1 up to the trained N."""
    order: Order = "halton"
    """Which tokens are unmasked when: by chance, in a fixed order that fills the grid evenly, or the surest draws first."""
    reveal: Literal["schedule", "cosine", "arccos"] = "arccos"
    """How the masked share falls in `halton` and `confidence`: evenly along the trained schedule, or ever faster."""
    guidance_scale: float = 8.0
    """λ of Sec. 3.2, at least 0: 0 ignores the condition, 1 follows the prediction, more exaggerates."""
    guidance_schedule: Literal["constant", "linear", "power-cosine", "interval"] = "constant"
    """λ at every step; rising from 1 to λ evenly or late; or λ inside `guidance_interval` and 1 outside."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Where `interval` guides, as shares 1 - n / N of the way from noise to image; unguided steps cost half."""
    truncation: float = 1.0
    """Probability mass of the likeliest codes that x_0 is drawn from, above 0; 1 keeps all."""
    temperature: float = 1.0
    """Divides the guided logits, above 0."""
    choice_temperature: float = 4.5
    """Gumbel noise on the confidence that chooses tokens, at least 0, falling to none at the last step (MaskGIT)."""

    def __post_init__(self) -> None:
        start, end = self.guidance_interval
        orders, reveals = ("ancestral", "halton", "confidence"), ("schedule", "cosine", "arccos")
        schedules = ("constant", "linear", "power-cosine", "interval")
        require(self.num_steps >= 1, "num_steps", self.num_steps, "at least 1")
        require(self.order in orders, "order", self.order, f"one of {', '.join(orders)}")
        require(self.reveal in reveals, "reveal", self.reveal, f"one of {', '.join(reveals)}")
        require(0 <= self.guidance_scale < math.inf, "guidance_scale", self.guidance_scale, "at least 0 and finite")
        known = self.guidance_schedule in schedules
        require(known, "guidance_schedule", self.guidance_schedule, f"one of {', '.join(schedules)}")
        ordered = 0 <= start <= end <= 1
        require(ordered, "guidance_interval", self.guidance_interval, "two shares of the way, 0 <= start <= end <= 1")
        require(0 < self.truncation <= 1, "truncation", self.truncation, "above 0 and at most 1")
        require(0 < self.temperature < math.inf, "temperature", self.temperature, "above 0 and finite")
        noise = self.choice_temperature
        require(0 <= noise < math.inf, "choice_temperature", noise, "at least 0 and finite")

    @staticmethod
    def paper() -> SamplerConfig:
        """The paper's settings: 100 ancestral steps (VQ-Diffusion's N), guided by a constant λ = 8."""
        return SamplerConfig(num_steps=100, order="ancestral")


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """One pass of the chain from `step` to `prev_step`; `share` of the tokens masked at the start stay masked after it."""

    step: int
    prev_step: int
    share: float


def stride_steps(start_step: int, num_steps: int) -> list[int]:
    """The steps a chain visits from `start_step` down to 0, spread evenly; num_steps passes, or one per step if fewer remain."""
    passes = min(num_steps, start_step)
    return [round(start_step * (passes - index) / passes) for index in range(passes + 1)] if passes else [0]


def plan(schedule: Schedule, config: SamplerConfig, *, grid: int, start_step: int) -> list[Move]:
    """The passes of a chain; in every order a pass starts at the step whose masked share its tokens have.

    A pass of `halton` or `confidence` that would unmask no token of the whole grid is left out.
    """
    gamma_bar = schedule.gamma_bar[: start_step + 1]
    visited = stride_steps(start_step, config.num_steps)
    if config.order == "ancestral" or start_step == 0:
        return [Move(step=n, prev_step=s, share=float(gamma_bar[s] / gamma_bar[-1])) for n, s in pairwise(visited)]
    masked = grid**2 * float(gamma_bar[-1])
    shares = [1.0]
    for index in range(1, len(visited) - 1):
        share = _masked_share(
            config.reveal, index / (len(visited) - 1), float(gamma_bar[visited[index]] / gamma_bar[-1])
        )
        if 0 < round(masked * share) < round(masked * shares[-1]):
            shares.append(share)
    steps = [max(1, int((gamma_bar - gamma_bar[-1] * share).abs().argmin())) for share in shares]
    following = [min(s, n - 1) for n, s in pairwise(steps)] + [0]
    return [
        Move(step=n, prev_step=s, share=share) for n, s, share in zip(steps, following, [*shares[1:], 0.0], strict=True)
    ]


def _masked_share(reveal: Literal["schedule", "cosine", "arccos"], passed: float, scheduled: float) -> float:
    if reveal == "schedule":
        return scheduled
    return math.cos(passed * math.pi / 2) if reveal == "cosine" else math.acos(passed) * 2 / math.pi


def guidance_at(config: SamplerConfig, progress: float) -> float:
    """λ at a point of the way from noise (0) to image (1)."""
    rise = config.guidance_scale - 1
    if config.guidance_schedule == "linear":
        return 1 + rise * progress
    if config.guidance_schedule == "power-cosine":
        return 1 + rise * (1 - math.cos(math.pi * progress**GUIDANCE_POWER)) / 2
    if config.guidance_schedule == "interval":
        start, end = config.guidance_interval
        return config.guidance_scale if start <= progress <= end else 1.0
    return config.guidance_scale


def passes(
    schedule: Schedule,
    config: SamplerConfig,
    moves: Sequence[Move],
    masked: Int[Tensor, "batch"],
    *,
    grid: int,
    generators: Sequence[torch.Generator],
    device: torch.device | str,
) -> list[Pass]:
    """What each pass needs beside tokens and prediction, brought to the device before the first: later the host would be waited for.

    Args:
        masked: how many tokens of each image are masked at the start.
        generators: one for each image; advanced by one number for each token and pass, by two in `confidence`.
    """
    batch, seq, total = len(generators), grid**2, len(moves)
    step, prev_step = (torch.tensor([getattr(m, name) for m in moves]) for name in ("step", "prev_step"))
    stride, steps = schedule.stride(step, prev_step).to(device), step[:, None].repeat(1, batch).to(device)
    guidance = [guidance_at(config, 1 - move.step / schedule.num_steps) for move in moves]
    numbers = [
        [scale, config.temperature, config.choice_temperature * (1 - (index + 1) / total)]
        for index, scale in enumerate(guidance)
    ]
    scale, temperature, noise = torch.tensor(numbers, dtype=torch.float64, device=device).unbind(1)
    places, count = _counts(schedule, config, moves, masked, seq)
    count, rank = count.to(device), (halton_rank(grid) if config.order == "halton" else torch.arange(seq)).to(device)
    luck = _luck(generators, total, 2 if config.order == "confidence" else 1, seq).to(device)
    return [
        Pass(
            step=steps[index],
            stride=stride.at(index),
            scale=None if guidance[index] == 1 else scale[index],
            temperature=temperature[index],
            noise=noise[index],
            places=places[index],
            rank=rank,
            count=count[index],
            level=luck[index, 0],
            luck=luck[index, -1],
        )
        for index in range(total)
    ]


def _counts(
    schedule: Schedule, config: SamplerConfig, moves: Sequence[Move], masked: Int[Tensor, "batch"], seq: int
) -> tuple[list[int], Int[Tensor, "moves batch"]]:
    """How many tokens of an image a pass may change, at most; and how many masked ones it draws in each, in a chosen order."""
    shares = torch.tensor([1.0, *(move.share for move in moves)], dtype=torch.float64)
    left = (masked * shares[:, None]).round().long()  # moves+1 batch
    count = left[:-1] - left[1:]
    if config.order == "ancestral" or schedule.replaces:
        return [seq] * len(moves), count
    drawn = count if config.order == "halton" else left[:-1]  # confidence is known of what has been drawn
    return drawn.amax(1).clamp_min(1).tolist(), count


def _luck(
    generators: Sequence[torch.Generator], total: int, kinds: int, seq: int
) -> Float[Tensor, "moves kinds batch seq"]:
    """Uniform numbers for all passes, in the order in which an image's generator gives them."""
    numbers = uniform(generators, len(generators), total * kinds * seq).view(-1, total, kinds, seq).permute(1, 2, 0, 3)
    return numbers.clone(memory_format=torch.contiguous_format)  # so that no stride tells how many passes there are


@lru_cache(maxsize=16)
def halton_rank(grid: int) -> Int[Tensor, "seq"]:
    """When each cell of a grid is first visited by the Halton sequence of bases 2 and 3: early cells lie far apart."""
    rank: dict[int, int] = {}
    point = 0
    while len(rank) < grid**2:
        point += 1
        row, column = (int(_radical_inverse(point, base) * grid) for base in (2, 3))
        rank.setdefault(row * grid + column, len(rank))
    with torch.inference_mode(False):
        return torch.tensor([rank[cell] for cell in range(grid**2)])


def _radical_inverse(number: int, base: int) -> float:
    """The digits of a number mirrored at the point: 6 = 110₂ becomes 0.011₂."""
    inverse, place = 0.0, 1.0
    while number:
        place /= base
        number, digit = divmod(number, base)
        inverse += digit * place
    return inverse
