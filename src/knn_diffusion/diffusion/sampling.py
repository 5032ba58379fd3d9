"""Algorithm 2 over any denoise callable: guidance, then the posterior, then a draw; and two orders for few steps.

`ancestral` is the paper's chain: each token is unmasked by chance, at any stride. `halton` and `confidence` decide
themselves which tokens are unmasked, so that few steps spread them well or take the surest first; what is drawn there is
the same posterior. All orders give the denoiser the step whose masked share the tokens have.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from types import EllipsisType
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knn_diffusion.config import config, require
from knn_diffusion.diffusion.process import Schedule, categorical, pick, posterior, prior_sample, uniform
from knn_diffusion.errors import CheckpointError, UsageError
from knn_diffusion.shapes import Logits, Tokens

Denoise = Callable[[Tensor, Tensor, Any], Tensor]
"""(x_n, step, condition) -> logits of x_0; the condition is opaque here."""

Places = Bool[Tensor, "batch seq"] | EllipsisType
"""Which tokens of a batch are meant; `...` for all."""

GUIDANCE_POWER = 3.0
"""Exponent of the power-cosine guidance schedule: nearly unguided for the first third (1d-tokenizer's choice)."""


@config
class SamplerConfig:
    """How an image is drawn; the defaults are for few steps, `paper()` is Algorithm 2 as printed."""

    num_steps: int = 16
    """Passes through the denoiser, 1 up to the trained N."""
    order: Literal["ancestral", "halton", "confidence"] = "halton"
    """Which tokens are unmasked when: by chance, in a fixed order that fills the grid evenly, or the surest first."""
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


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the denoiser said of x_0, guided only where it is asked for: the vocabulary is the longest axis there is."""

    conditional: Logits
    unconditional: Logits | None
    """None where λ is 1."""
    scale: float

    def at(self, places: Places) -> Float[Tensor, "*places vocab"]:
        """Guided float32 logits. Raises: CheckpointError where they are not finite."""
        given = _finite(self.conditional[places])
        return given if self.unconditional is None else guide(given, _finite(self.unconditional[places]), self.scale)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInfo:
    """What a step callback is told after each pass; it may raise to end the chain."""

    index: int
    """Passes made, 1 … total."""
    total: int
    step: int
    """The step the chain has reached, 0 at the end."""
    x_n: Tokens
    prediction: Prediction

    @property
    def x_0(self) -> Tokens:
        """The likeliest image: tokens already drawn, and the most probable code where [MASK] remains."""
        mask_id = self.prediction.conditional.shape[-1]
        return torch.where(self.x_n == mask_id, self.prediction.at(...).argmax(-1), self.x_n)


@dataclass(frozen=True, kw_only=True, slots=True)
class Move:
    """One pass of the chain from `step` to `prev_step`; `share` of the tokens masked at the start stay masked after it."""

    step: int
    prev_step: int
    share: float


@torch.no_grad()
def sample(
    denoise: Denoise,
    schedule: Schedule,
    condition: Any,
    both: Any | None,
    *,
    config: SamplerConfig,
    grid: int,
    generators: Sequence[torch.Generator],
    x_start: Tokens | None = None,
    start_step: int | None = None,
    callback: Callable[[StepInfo], None] | None = None,
    device: torch.device | str = "cpu",
) -> Tokens:
    """Draw the tokens of new images: Algorithm 2, lines 5-10, with the guidance of Sec. 3.2.

    Args:
        condition: y of each image, as `denoise` takes it.
        both: y of all images, then the null condition of all; None where nothing is guided.
        grid: tokens along one side of the image.
        generators: one for each image; they decide the number of images, and an image depends on its own alone.
        x_start: for editing, a reference's tokens noised to `start_step`; without it the chain starts from the prior.
        start_step: where `x_start` stands, 0 … N; 0 returns it unchanged.
        callback: called after each pass.
        device: where a chain without `x_start` runs.
    Returns: codes without any [MASK].
    Raises: UsageError for more steps than trained, guidance without `both`, or a start that does not fit.

    Differs from the paper: guidance acts on the x_0 logits, before the posterior is formed (see `guide`).
    """
    start = schedule.num_steps if start_step is None else start_step
    batch, seq = len(generators), grid**2
    _check_start(schedule, config, shape=(batch, seq), x_start=x_start, start_step=start_step)
    x_n = prior_sample(schedule, batch, seq, generators, device) if x_start is None else x_start
    masked_at_start = (x_n == schedule.mask_id).sum(1).double()
    moves = plan(schedule, config, grid=grid, start_step=start)
    for index, move in enumerate(moves):
        scale = guidance_at(config, 1 - move.step / schedule.num_steps)
        step = torch.full((len(x_n),), move.step, device=x_n.device)
        prediction = _predict(denoise, x_n, step, condition=condition, both=both, scale=scale)
        chances = partial(_chances, schedule, config, prediction, x_n, move)
        if config.order == "ancestral":
            x_n = categorical(chances(...), generators)
        else:
            left = (masked_at_start * move.share).round().long()
            noise = config.choice_temperature * (1 - (index + 1) / len(moves))
            x_n = _unmask(schedule, config.order, chances, x_n, left=left, noise=noise, generators=generators)
        if callback is not None:
            callback(StepInfo(index=index + 1, total=len(moves), step=move.prev_step, x_n=x_n, prediction=prediction))
    return x_n


def _chances(
    schedule: Schedule, config: SamplerConfig, prediction: Prediction, x_n: Tokens, move: Move, places: Places
) -> Float[Tensor, "*places classes"]:
    """What each of these tokens may become in a pass, float64; [MASK] is the last class."""
    logits = truncate(prediction.at(places) / config.temperature, config.truncation)
    return posterior(schedule, logits, x_n[places], torch.tensor(move.step), torch.tensor(move.prev_step))


def _check_start(
    schedule: Schedule, config: SamplerConfig, *, shape: tuple[int, int], x_start: Tokens | None, start_step: int | None
) -> None:
    trained = schedule.num_steps
    if config.num_steps > trained:
        raise UsageError(f"expected at most {trained} steps, as trained, got {config.num_steps}: ask for fewer steps")
    if (x_start is None) != (start_step is None):
        raise UsageError("expected x_start and start_step together, got one of them: pass both to edit, or neither")
    if x_start is not None and x_start.shape != shape:
        got = tuple(x_start.shape)
        raise UsageError(f"expected x_start of shape {shape}, got {got}: pass one row of grid² tokens per generator")
    if start_step is not None and not 0 <= start_step <= trained:
        raise UsageError(f"expected start_step from 0 to {trained}, got {start_step}: use a step of this schedule")


def _predict(
    denoise: Denoise, x_n: Tokens, step: Int[Tensor, "batch"], *, condition: Any, both: Any | None, scale: float
) -> Prediction:
    """One pass through the denoiser: both halves of guidance as one batch, or the conditional half where λ is 1."""
    if scale == 1:
        return Prediction(denoise(x_n, step, condition), None, scale)
    if both is None:
        raise UsageError(f"guidance of {scale:g} needs the null condition, got none: pass both, or guidance_scale=1")
    given, null = denoise(torch.cat([x_n, x_n]), torch.cat([step, step]), both).chunk(2)
    return Prediction(given, null, scale)


def _finite(logits: Float[Tensor, "*places vocab"]) -> Float[Tensor, "*places vocab"]:
    """As float32."""
    logits = logits.float()
    if not bool(logits.sum().isfinite()):  # NaN and infinity stay what they are in a sum
        raise CheckpointError("expected finite logits from the denoiser, got NaN or infinity: train or load it again")
    return logits


def guide(
    conditional: Float[Tensor, "*places vocab"], unconditional: Float[Tensor, "*places vocab"], scale: float
) -> Float[Tensor, "*places vocab"]:
    """Extrapolate from the null condition's x_0 logits through the condition's: Sec. 3.2, λ = scale.

    Differs from the paper: it writes this on p(x_{n-1}), whose [MASK] class is the same in both halves and would be crushed
    as the codes' logits grow (a masked share of 0.605 falls to 0.0015 in a toy case at λ = 8). On x_0 the pace stays exact.
    """
    return unconditional + scale * (conditional - unconditional)


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


def truncate(logits: Float[Tensor, "*places vocab"], mass: float) -> Float[Tensor, "*places vocab"]:
    """Keep the likeliest codes that together hold at least `mass` of each position's probability; the others get -inf."""
    if mass >= 1:
        return logits
    ordered, order = logits.softmax(-1).sort(-1, descending=True)
    beyond = ordered.cumsum(-1) - ordered >= mass
    return logits.masked_fill(beyond.gather(-1, order.argsort(-1)), -math.inf)


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


def _unmask(
    schedule: Schedule,
    order: Literal["halton", "confidence"],
    chances: Callable[[Places], Float[Tensor, "*places classes"]],
    x_n: Tokens,
    *,
    left: Int[Tensor, "batch"],
    noise: float,
    generators: Sequence[torch.Generator],
) -> Tokens:
    """One pass of a chosen order: all but `left` masked tokens of each image are drawn from the posterior's codes.

    Visible tokens follow the posterior too where the schedule replaces tokens, and stay where it only masks.
    """
    masked = x_n == schedule.mask_id
    moving = torch.ones_like(masked) if schedule.replaces else masked
    level = uniform(generators, len(x_n), x_n.shape[1], x_n.device)
    count = masked.sum(1) - left
    if order == "halton":
        rank = halton_rank(math.isqrt(x_n.shape[1])).to(x_n.device).double().expand(x_n.shape)
        chosen = _highest((-rank).masked_fill(~masked, -math.inf), count)
        moving = moving & (chosen | ~masked)
    codes = chances(moving)[..., :-1]
    drawn = x_n.masked_scatter(moving, pick(codes, level[moving]))
    if order == "confidence":
        chance = codes.gather(-1, drawn[moving].unsqueeze(-1))
        gumbel = -(-uniform(generators, len(x_n), x_n.shape[1], x_n.device).clamp_min(1e-300).log()).log()
        sure = torch.full_like(level, -math.inf).masked_scatter(moving, chance.log())
        chosen = _highest((sure + noise * gumbel).masked_fill(~masked, -math.inf), count)
    return torch.where(masked & ~chosen, schedule.mask_id, drawn)


def _highest(score: Float[Tensor, "batch seq"], count: Int[Tensor, "batch"]) -> Bool[Tensor, "batch seq"]:
    """Mark the `count` highest scores of each row."""
    place = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return place < count.unsqueeze(1)


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
