"""One pass of Algorithm 2, lines 6-9: guidance, then the posterior, then a draw.

It is a function of tensors and reads no value back from them. So a GPU never waits for the host, and the whole pass can be one
graph (`compiled`): whatever differs from pass to pass is a tensor of `Pass`, and what is not a tensor stands in `Way`.

Axis words beyond the legend of `shapes`: `places` are the tokens of each image that a pass may change; `rows` are the images,
or under guidance the conditional half of every image and then the unconditional one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from knn_diffusion.diffusion.process import Schedule, Stride, pick, posterior
from knn_diffusion.shapes import Steps, Tokens

Denoise = Callable[[Tensor, Tensor, Any], Tensor]
"""(x_n, step, condition) -> logits of x_0; the condition is opaque here."""

Order = Literal["ancestral", "halton", "confidence"]

Places = tuple[Int[Tensor, "batch 1"], Int[Tensor, "batch places"]]
"""Which tokens of a batch are meant, by image and position."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """What passes have in common; those that differ in it are different graphs."""

    denoise: Denoise
    schedule: Schedule
    order: Order
    truncation: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Pass:
    """What is a pass's own, where its tokens are; numbers are float64."""

    step: Steps
    stride: Stride
    scale: Float[Tensor, ""] | None
    """λ; None where it is 1, and the unconditional half is not needed."""
    temperature: Float[Tensor, ""]
    noise: Float[Tensor, ""]
    """Of the Gumbel noise on confidence."""
    places: int
    """How many tokens of each image may change, at most: `halton` and `confidence` compute no others. Not a tensor, but a shape."""
    rank: Int[Tensor, "seq"]
    """When each token has its turn, in `halton`."""
    count: Int[Tensor, "batch"]
    """How many masked tokens are drawn, in `halton` and `confidence`."""
    level: Float[Tensor, "batch seq"]
    """Uniform numbers in [0, 1) that decide what is drawn."""
    luck: Float[Tensor, "batch seq"]
    """As many for the noise on confidence; other orders do not read them."""


Step = Callable[[Way, Pass, Tokens, Any], tuple[Tokens, Float[Tensor, "rows seq vocab"], Bool[Tensor, ""]]]
"""`reverse_step`, or what it was compiled to."""


def reverse_step(
    way: Way, now: Pass, x_n: Tokens, y: Any
) -> tuple[Tokens, Float[Tensor, "rows seq vocab"], Bool[Tensor, ""]]:
    """Draw x_s from x_n, s steps before it.

    Args: y: the condition of each of `rows`.
    Returns: x_s; the logits of x_0 of each of `rows`; whether all of these that were needed are finite.

    Differs from the paper: guidance acts on the x_0 logits, before the posterior is formed (see `guide`).
    """
    halves = 1 if now.scale is None else 2
    logits = way.denoise(x_n.repeat(halves, 1), now.step.repeat(halves), y)
    places = ... if way.order == "ancestral" else _next_places(way, now, x_n)
    x_0 = guided(logits, now.scale, places)
    p_s = posterior(way.schedule, truncate(x_0 / now.temperature, way.truncation), x_n[places], now.stride)
    x_s = pick(p_s, now.level) if places is ... else _unmask(way, now, x_n, p_s, places)
    return x_s, logits, x_0.sum().isfinite()  # NaN and infinity stay what they are in a sum


def guided(
    logits: Float[Tensor, "rows seq vocab"], scale: Float[Tensor, ""] | None, places: Places | EllipsisType
) -> Float[Tensor, "batch places vocab"]:
    """Guided float32 logits, only where they are asked for: the vocabulary is the longest axis there is."""
    if scale is None:
        return logits[places].float()
    conditional, unconditional = logits.chunk(2)
    return guide(conditional[places].float(), unconditional[places].float(), scale)


def guide(
    conditional: Float[Tensor, "*places vocab"],
    unconditional: Float[Tensor, "*places vocab"],
    scale: float | Float[Tensor, ""],
) -> Float[Tensor, "*places vocab"]:
    """Extrapolate from the null condition's x_0 logits through the condition's: Sec. 3.2, λ = scale.

    Differs from the paper: it writes this on p(x_{n-1}), whose [MASK] class is the same in both halves and would be crushed
    as the codes' logits grow (a masked share of 0.605 falls to 0.0015 in a toy case at λ = 8). On x_0 the pace stays exact.
    """
    return unconditional + scale * (conditional - unconditional)


def truncate(logits: Float[Tensor, "*places vocab"], mass: float) -> Float[Tensor, "*places vocab"]:
    """Keep the likeliest codes that together hold at least `mass` of each position's probability; the others get -inf."""
    if mass >= 1:
        return logits
    ordered, order = logits.softmax(-1).sort(-1, descending=True)
    beyond = ordered.cumsum(-1) - ordered >= mass
    return logits.masked_fill(beyond.gather(-1, order.argsort(-1)), -math.inf)


def _next_places(way: Way, now: Pass, x_n: Tokens) -> Places:
    """The masked tokens whose turn is next, then visible ones."""
    batch, seq = x_n.shape
    turn = torch.where(x_n == way.schedule.mask_id, now.rank, now.rank + seq)
    return torch.arange(batch, device=x_n.device)[:, None], turn.argsort(dim=1)[:, : now.places]


def _unmask(way: Way, now: Pass, x_n: Tokens, p_s: Float[Tensor, "batch places classes"], places: Places) -> Tokens:
    """Draw `count` masked tokens of each image from the posterior's codes: those whose turn is next, or the surest draws.

    The surest are chosen by what was drawn, which favours likely codes; a turn that is fixed favours none. Visible tokens follow the posterior too where the schedule replaces tokens, and stay where it only masks.
    """
    codes, shown = p_s[..., :-1], x_n[places]
    masked = shown == way.schedule.mask_id
    drawn = pick(codes, now.level[places])
    turn = torch.arange(now.places, device=x_n.device)
    if way.order == "confidence":
        chance = codes.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
        gumbel = -(-now.luck[places].clamp_min(1e-300).log()).log()
        sure = (chance.log() + now.noise * gumbel).masked_fill(~masked, -math.inf)
        turn = sure.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    chosen = turn < now.count.unsqueeze(1)
    moves = torch.where(masked, chosen, way.schedule.replaces)
    return x_n.index_put(places, torch.where(moves, drawn, shown))
