"""What the denoiser is conditioned on: y of Eqs. 4 and 5, the null condition y' = 0 (Sec. 3.2) and what training does to y."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from knn_diffusion.config import require
from knn_diffusion.errors import UsageError
from knn_diffusion.randomness import rand, randn
from knn_diffusion.shapes import Condition

MAX_QUERY_WEIGHT = 3.0


def make_condition(
    query: Float[Tensor, "batch dim"],
    neighbors: Float[Tensor, "batch k dim"],
    present: Bool[Tensor, "batch k"] | None = None,
) -> Condition:
    """Put the query before its K nearest neighbors: y of Eq. 4 (an image's own embedding) and Eq. 5 (a text's).

    Args:
        neighbors: nearest first; K may be 0.
        present: which neighbors were found; the others are masked out, since even a zero key would draw attention.
    """
    if present is None:
        present = torch.ones(neighbors.shape[:2], dtype=torch.bool, device=neighbors.device)
    found = torch.where(present.unsqueeze(-1), neighbors, 0)
    own = torch.ones(len(query), 1, dtype=torch.bool, device=present.device)
    return Condition(y=torch.cat([query.unsqueeze(1), found], dim=1), present=torch.cat([own, present], dim=1))


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
    """The null condition y' = 0 of Sec. 3.2, as large as `condition`: through bias-free cross-attention it adds nothing."""
    return Condition(y=torch.zeros_like(condition.y), present=torch.ones_like(condition.present))


def with_null(condition: Condition, null: Float[Tensor, "slots dim"] | None = None) -> Condition:
    """Conditional rows, then as many null rows: both halves of guidance as one batch.

    Args: null: what stands for no condition where it is not y' = 0, as for denoisers of texts.
    """
    rows = (
        null_condition(condition)
        if null is None
        else Condition(y=null.expand_as(condition.y), present=condition.present)
    )
    return Condition(y=torch.cat([condition.y, rows.y]), present=torch.cat([condition.present, rows.present]))


def replace_first_neighbor(condition: Condition, embedding: Float[Tensor, "batch dim"]) -> Condition:
    """Put a reference image's embedding in the first neighbor's place: editing, Sec. 4.4.

    Raises: UsageError when the condition has no neighbors.
    """
    if condition.y.shape[1] < 2:
        raise UsageError("expected a neighbor to replace, got a condition without any: ask for k of at least 1")
    y, present = condition.y.clone(), condition.present.clone()
    y[:, 1] = embedding
    present[:, 1] = True
    return Condition(y=y, present=present)


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
    return Condition(y=y, present=condition.present | dropped[:, None])


def drop_query(condition: Condition, probability: float, generator: torch.Generator) -> Condition:
    """Hide the query of a random part of the images, which leaves their neighbors alone; without any, the null condition.

    Differs from the paper: there the query is always shown. Training without it now and then keeps the denoiser from leaning
    on an image's own embedding, which no text can give.
    """
    dropped = _chosen(condition, probability, generator)
    y, present = condition.y.clone(), condition.present.clone()
    y[dropped, 0] = 0
    present[dropped, 0] = False
    alone = ~present.any(dim=1, keepdim=True)
    return Condition(y=y, present=present | alone)


def _chosen(condition: Condition, probability: float, generator: torch.Generator) -> Bool[Tensor, "batch"]:
    require(0 <= probability <= 1, "probability", probability, "between 0 and 1")
    drawn = rand(len(condition.y), generator=generator, dtype=torch.float64)
    return (drawn < probability).to(condition.y.device)
