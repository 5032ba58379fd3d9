"""What the denoiser is conditioned on: y of Eqs. 4 and 5, the null condition y' = 0 (Sec. 3.2) and what training does to y."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from knn_diffusion.config import require
from knn_diffusion.errors import UsageError
from knn_diffusion.randomness import rand, randn
from knn_diffusion.shapes import Condition, Tokens

MAX_QUERY_WEIGHT = 3.0


def make_condition(
    query: Float[Tensor, "batch dim"],
    neighbors: Float[Tensor, "batch k dim"],
    present: Bool[Tensor, "batch k"] | None = None,
    grids: Int[Tensor, "batch m seq"] | None = None,
    grids_present: Bool[Tensor, "batch m"] | None = None,
) -> Condition:
    """Put the query before its K nearest neighbors: y of Eq. 4 (an image's own embedding) and Eq. 5 (a text's).

    Args:
        neighbors: nearest first; K may be 0.
        present: which neighbors were found; the others are masked out, since even a zero key would draw attention.
        grids: tokens of the first m neighbors, where the denoiser reads them.
        grids_present: which of them there are; all of them by default.
    """
    if grids is not None and grids_present is None:
        grids_present = torch.ones(grids.shape[:2], dtype=torch.bool, device=grids.device)
    if present is None:
        present = torch.ones(neighbors.shape[:2], dtype=torch.bool, device=neighbors.device)
    found = torch.where(present.unsqueeze(-1), neighbors, 0)
    own = torch.ones(len(query), 1, dtype=torch.bool, device=present.device)
    return Condition(
        y=torch.cat([query.unsqueeze(1), found], dim=1),
        present=torch.cat([own, present], dim=1),
        grids=grids,
        grids_present=grids_present,
    )


def weigh_query(
    query: Float[Tensor, "batch dim"], neighbors: Float[Tensor, "batch k dim"], weight: float
) -> Float[Tensor, "batch dim"]:
    """The query slot of y: the text's embedding (weight 1, Eq. 5), moved towards its neighbors' mean or away from it.

    Args:
        neighbors: absent ones are 0.
        weight: 0 is the neighbors' mean, up to MAX_QUERY_WEIGHT.

    Differs from the paper: other weights than 1. Below it the query comes nearer to images, from which texts keep apart in
    H; above it, what the text says and its neighbors do not show becomes louder.
    """
    if weight == 1:
        return query
    mean = normalize(neighbors.sum(dim=1), dim=-1)
    return normalize(weight * query + (1 - weight) * mean, dim=-1)


def null_condition(condition: Condition) -> Condition:
    """The null condition y' = 0 of Sec. 3.2, as large as `condition`: through bias-free cross-attention it adds nothing.

    It has no grids.
    """
    nothing = replace(condition, y=torch.zeros_like(condition.y), present=torch.ones_like(condition.present))
    return _without_grids(nothing)


def with_null(condition: Condition, null: Float[Tensor, "slots dim"] | None = None) -> Condition:
    """Conditional rows, then as many null rows: both halves of guidance as one batch.

    Args: null: what stands for no condition where it is not y' = 0, as for denoisers of texts.
    """
    if null is None:
        return Condition.cat([condition, null_condition(condition)])
    return Condition.cat([condition, _without_grids(replace(condition, y=null.expand_as(condition.y)))])


def replace_first_neighbor(
    condition: Condition, embedding: Float[Tensor, "batch dim"], tokens: Tokens | None = None
) -> Condition:
    """Put a reference image in the first neighbor's place: its embedding (editing, Sec. 4.4) and, where grids are read, its tokens.

    Raises: UsageError when the condition has no neighbors.
    """
    if condition.y.shape[1] < 2:
        raise UsageError("expected a neighbor to replace, got a condition without any: ask for k of at least 1")
    y, present = condition.y.clone(), condition.present.clone()
    y[:, 1] = embedding
    present[:, 1] = True
    changed = replace(condition, y=y, present=present)
    if tokens is None or condition.grids is None or condition.grids_present is None:
        return changed
    grids, grids_present = condition.grids.clone(), condition.grids_present.clone()
    grids[:, 0] = tokens
    grids_present[:, 0] = True
    return replace(changed, grids=grids, grids_present=grids_present)


def lead_with(condition: Condition, leader: int) -> Condition:
    """Let the neighbor at this place, from 0, change places with the first: in y and among the grids."""
    slots, grids = list(range(condition.y.shape[1])), condition.grids
    slots[1], slots[1 + leader] = slots[1 + leader], slots[1]
    led = replace(condition, y=condition.y[:, slots], present=condition.present[:, slots])
    if grids is None or condition.grids_present is None:
        return led
    order = list(range(grids.shape[1]))
    order[0], order[leader] = order[leader], order[0]
    return replace(led, grids=grids[:, order], grids_present=condition.grids_present[:, order])


def led_in_turn(condition: Condition, number: int) -> Condition:
    """One image's condition, led by the neighbors whose grids there are in turn: image `number` by the number-th, round and round."""
    if condition.grids_present is None:
        return condition
    leaders = condition.grids_present[0].nonzero().flatten().tolist()
    return lead_with(condition, leaders[number % len(leaders)]) if leaders else condition


def agreeing(
    neighbors: Float[Tensor, "batch k dim"], present: Bool[Tensor, "batch k"], least: float, coordinates: int
) -> Bool[Tensor, "batch k"]:
    """Which neighbors show what the first one shows, by the cosine of their embeddings to its.

    Args:
        least: a smaller cosine disagrees.
        coordinates: how many of the embeddings' are compared, the first ones; 0 for all.

    Differs from the paper, which shows all K: neighbors that a text finds by different words of it make mixtures.
    """
    meaning = normalize(neighbors[..., : coordinates or None], dim=-1)
    cosine = (meaning * meaning[:, :1]).sum(-1)
    agree = cosine >= least
    agree[:, :1] = True
    return present & agree


def lafite_noise(
    embedding: Float[Tensor, "batch dim"], weight: float, generator: torch.Generator
) -> Float[Tensor, "batch dim"]:
    """Turn unit embeddings towards random directions, as LAFITE does in place of neighbors (the baseline of Table 3).

    Args:
        weight: share of the random direction, 0 … 1; LAFITE's 0.75 leaves a cosine of about 0.32 to the embedding.
    """
    require(0 <= weight <= 1, "weight", weight, "between 0 and 1")
    drawn = randn(*embedding.shape, generator=generator).to(embedding)
    return normalize((1 - weight) * embedding + weight * normalize(drawn, dim=-1), dim=-1)


def drop_condition(condition: Condition, probability: float, generator: torch.Generator) -> Condition:
    """Give a random part of the images the null condition, so that guidance's other half is trained too.

    Differs from the paper: it guides with a null condition that was never trained (probability 0 here).
    """
    dropped = _chosen(condition, probability, generator)
    y = torch.where(dropped[:, None, None], 0, condition.y)
    left = replace(condition, y=y, present=condition.present | dropped[:, None])
    return _without_grids(left, dropped)


def drop_query(condition: Condition, probability: float, generator: torch.Generator) -> Condition:
    """Hide the query of a random part of the images, which leaves their neighbors alone; without any, the null condition.

    Grids stay.

    Differs from the paper: there the query is always shown. Training without it now and then keeps the denoiser from leaning
    on an image's own embedding, which no text can give.
    """
    dropped = _chosen(condition, probability, generator)
    y, present = condition.y.clone(), condition.present.clone()
    y[dropped, 0] = 0
    present[dropped, 0] = False
    alone = ~present.any(dim=1, keepdim=True)
    return replace(condition, y=y, present=present | alone)


def _without_grids(condition: Condition, rows: Bool[Tensor, "batch"] | None = None) -> Condition:
    """The condition with no grid present, in these rows or in all."""
    if condition.grids_present is None:
        return condition
    left = torch.zeros_like(condition.grids_present) if rows is None else condition.grids_present & ~rows[:, None]
    return replace(condition, grids_present=left)


def _chosen(condition: Condition, probability: float, generator: torch.Generator) -> Bool[Tensor, "batch"]:
    require(0 <= probability <= 1, "probability", probability, "between 0 and 1")
    drawn = rand(len(condition.y), generator=generator, dtype=torch.float64)
    return (drawn < probability).to(condition.y.device)
