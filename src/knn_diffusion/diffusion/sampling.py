"""Algorithm 2 over any denoise callable: `plan` says what is visited, `step` draws the next tokens.

Between the first pass and the last the host reads nothing from the device: what must be known of tokens and settings is settled
before, and whether the predictions were finite is read at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from knn_diffusion.diffusion.plan import SamplerConfig, passes, plan
from knn_diffusion.diffusion.process import Schedule, prior_sample
from knn_diffusion.diffusion.step import Denoise, Step, Way, guided, reverse_step
from knn_diffusion.errors import CheckpointError, UsageError
from knn_diffusion.shapes import Tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class StepInfo:
    """What a step callback is told after each pass; it may raise to end the chain."""

    index: int
    """Passes made, 1 … total."""
    total: int
    step: int
    """The step the chain has reached, 0 at the end."""
    x_n: Tokens
    logits: Float[Tensor, "rows seq vocab"]
    """Of x_0: the conditional half of every image, then the unconditional one unless λ is 1."""
    scale: Float[Tensor, ""] | None
    """λ; None where it is 1."""

    @property
    def x_0(self) -> Tokens:
        """The likeliest image: tokens already drawn, and the most probable code where [MASK] remains.

        Raises: CheckpointError when the denoiser's logits are not finite.
        """
        x_0 = guided(self.logits, self.scale, ...)
        _check_finite(x_0.sum().isfinite())
        return torch.where(self.x_n == self.logits.shape[-1], x_0.argmax(-1), self.x_n)


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
    step: Step = reverse_step,
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
        step: `reverse_step`, or a compiled form of it.
    Returns: codes without any [MASK].
    Raises: UsageError for more steps than trained, guidance without `both`, or a start that does not fit; CheckpointError, at
        the end, when the denoiser's logits were not finite.
    """
    start = schedule.num_steps if start_step is None else start_step
    batch, seq = len(generators), grid**2
    _check_start(schedule, config, shape=(batch, seq), x_start=x_start, start_step=start_step)
    x_n = prior_sample(schedule, batch, seq, generators) if x_start is None else x_start  # 5
    masked = (x_n == schedule.mask_id).sum(1).cpu()
    x_n = x_n.to(device) if x_start is None else x_start
    moves = plan(schedule, config, grid=grid, start_step=start)
    if not moves:
        return x_n
    ahead = passes(schedule, config, moves, masked, grid=grid, generators=generators, device=x_n.device)
    if both is None and any(now.scale is not None for now in ahead):
        scale = config.guidance_scale
        raise UsageError(f"guidance of {scale:g} needs the null condition, got none: pass both, or guidance_scale=1")
    way = Way(denoise=denoise, schedule=schedule, order=config.order, truncation=config.truncation)
    finite = torch.ones((), dtype=torch.bool, device=x_n.device)
    for index, (move, now) in enumerate(zip(moves, ahead, strict=True), start=1):  # 6
        x_n, logits, sound = step(way, now, x_n, condition if now.scale is None else both)  # 7-9
        finite = finite & sound
        if callback is not None:
            where = {"index": index, "total": len(moves), "step": move.prev_step}
            callback(StepInfo(**where, x_n=x_n, logits=logits, scale=now.scale))
    _check_finite(finite)
    return x_n


def _check_finite(finite: Bool[Tensor, ""]) -> None:
    if not finite:
        raise CheckpointError("expected finite logits from the denoiser, got NaN or infinity: train or load it again")


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
