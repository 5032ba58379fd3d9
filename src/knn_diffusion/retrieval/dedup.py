"""De-duplication of neighbor lists, paper A.4: near-copies teach the generator nothing and crowd out other images.

First by cosine, since "higher than 0.9 … usually represent the same image"; then by Manhattan distance of 8×8 pictures.

Differs from the paper: Manhattan distance is taken between thumbnails, because on unit vectors it nearly repeats cosine;
the cosine threshold belongs to the encoder (0.9 is CLIP's, elsewhere it may delete every picture of a concept, so it is
calibrated on pictures where there are any); and since
no image comes near a *text* by cosine, neighbors are also held against each other, so that lists look alike in training
and at inference.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int16
from torch import Tensor

from knn_diffusion.config import config, require
from knn_diffusion.device import own_defaults
from knn_diffusion.retrieval.segments import THUMBNAIL_VALUES, Snapshot
from knn_diffusion.retrieval.store import Store

FLOOR, CEILING = 0.9, 0.9999
COMPARED_AT_ONCE = 32
"""Lists of up to so many neighbors are first looked at whole: most repeat nothing, and then that was all."""


@config
class DedupConfig:
    """When two images count as the same picture. None switches a rule off.

    cosine     above this cosine of their embeddings, in (0, 1]
    manhattan  at or below this mean absolute difference of their 8×8 pictures, in levels of 0 … 255; copies that were
               resized differ by at most 0.9, by JPEG quality 60 too up to 2 (90 % of 150 emoji of 77 to 512 pixels)
    """

    cosine: float | None = 0.9
    manhattan: float | None = 2.0

    def __post_init__(self) -> None:
        require(self.cosine is None or 0 < self.cosine <= 1, "cosine", self.cosine, "in (0, 1] or None")
        require(self.manhattan is None or 0 <= self.manhattan <= 255, "manhattan", self.manhattan, "in 0 … 255 or None")


OFF = DedupConfig(cosine=None, manhattan=None)


def duplicates(
    one: Float[Tensor, "queries dim"],
    one_picture: Int16[Tensor, "queries values"],
    many: Float[Tensor, "queries candidates dim"],
    many_pictures: Int16[Tensor, "queries candidates values"],
    rule: DedupConfig,
) -> Bool[Tensor, "queries candidates"]:
    """Which candidates show the same picture as the one of their query.

    Args:
        one, many: unit vectors.
        one_picture, many_pictures: 8×8 pictures in 0 … 255; a picture that is not known starts with -1.
    """
    return _same(one[:, None], one_picture[:, None], many, many_pictures, rule)[:, 0]


def first_different(
    candidates: Float[Tensor, "queries candidates dim"],
    pictures: Int16[Tensor, "queries candidates values"],
    valid: Bool[Tensor, "queries candidates"],
    k: int,
    rule: DedupConfig,
) -> Int[Tensor, "queries k"]:
    """Places of the first k valid candidates of which none shows the same picture as one before it; -1 where none is left.

    Greedy, best first: a candidate goes only if it repeats one that stays. (Chains of likeness would remove half of all.)
    """
    if k > COMPARED_AT_ONCE:
        return _one_by_one(candidates, pictures, valid, k, rule)
    places, there = _front(valid, k)
    chosen = torch.nn.functional.pad(torch.where(there, places, -1), (0, k - places.shape[1]), value=-1)
    if rule != OFF:
        pairs = _pairs(candidates, pictures, places, rule)
        repeats = (pairs & there[:, :, None] & there[:, None]).triu(1).flatten(1).any(1)
        some = repeats.nonzero()[:, 0]
        if len(some):
            chosen[some] = _by_pairs(candidates[some], pictures[some], valid[some], k, rule)
    return chosen


def _front(valid: Bool[Tensor, "queries candidates"], count: int) -> tuple[Tensor, Tensor]:
    """Places of the first so many candidates of each query, the valid ones before the others, and which are valid."""
    places = (~valid).int().argsort(dim=1, stable=True)[:, :count]
    return places, valid.gather(1, places)


def _pairs(
    candidates: Float[Tensor, "queries candidates dim"],
    pictures: Int16[Tensor, "queries candidates values"],
    places: Int[Tensor, "queries some"],
    rule: DedupConfig,
) -> Bool[Tensor, "queries some some"]:
    """Which of the candidates at these places show the same picture as which."""
    vectors, shown = candidates.take_along_dim(places[:, :, None], 1), pictures.take_along_dim(places[:, :, None], 1)
    return _same(vectors, shown, vectors, shown, rule)


def _same(
    some: Float[Tensor, "queries some dim"],
    some_pictures: Int16[Tensor, "queries some values"],
    others: Float[Tensor, "queries others dim"],
    other_pictures: Int16[Tensor, "queries others values"],
    rule: DedupConfig,
) -> Bool[Tensor, "queries some others"]:
    """Which show the same picture as which of the others of their query."""
    known = (some_pictures[:, :, None, 0] >= 0) & (other_pictures[:, None, :, 0] >= 0)
    same = torch.zeros_like(known)
    if rule.cosine is not None:
        same |= torch.bmm(some, others.transpose(1, 2)) > rule.cosine
    if rule.manhattan is not None and known.any():
        distance = (some_pictures[:, :, None] - other_pictures[:, None]).abs().sum(-1)
        same |= known & (distance <= rule.manhattan * THUMBNAIL_VALUES)
    return same


def _by_pairs(
    candidates: Float[Tensor, "queries candidates dim"],
    pictures: Int16[Tensor, "queries candidates values"],
    valid: Bool[Tensor, "queries candidates"],
    k: int,
    rule: DedupConfig,
) -> Int[Tensor, "queries k"]:
    """From all pairs of about twice as many candidates as wanted; one by one where these are not enough."""
    places, there = _front(valid, 2 * k + 16)
    pairs, gone = _pairs(candidates, pictures, places, rule).cpu().numpy(), ~there.cpu().numpy()
    for place in range(gone.shape[1]):
        stays = ~gone[:, place]
        gone |= pairs[:, place] & stays[:, None]
        gone[:, place] = ~stays
    first = torch.from_numpy(np.argsort(gone, axis=1, kind="stable")[:, :k]).to(places.device)
    stay = ~torch.from_numpy(gone).to(places.device)
    chosen = torch.where(stay.gather(1, first), places.gather(1, first), -1)
    chosen = torch.nn.functional.pad(chosen, (0, k - chosen.shape[1]), value=-1)
    if places.shape[1] < valid.shape[1]:
        short = ((chosen[:, -1] < 0) & (valid.sum(1) > there.sum(1))).nonzero()[:, 0]
        if len(short):
            chosen[short] = _one_by_one(candidates[short], pictures[short], valid[short], k, rule)
    return chosen


def _one_by_one(
    candidates: Float[Tensor, "queries candidates dim"],
    pictures: Int16[Tensor, "queries candidates values"],
    valid: Bool[Tensor, "queries candidates"],
    k: int,
    rule: DedupConfig,
) -> Int[Tensor, "queries k"]:
    """Take the best that is left, and leave out what repeats it, k times."""
    left, chosen = valid.clone(), []
    here = torch.arange(len(candidates), device=candidates.device)
    for _ in range(k):
        place = left.int().argmax(1)
        chosen.append(torch.where(left.any(1), place, -1))
        left[here, place] = False
        if rule != OFF:
            left &= ~duplicates(candidates[here, place], pictures[here, place], candidates, pictures, rule)
    return torch.stack(chosen, 1)


def gather(
    store: Store, rows: Int[np.ndarray, "rows"], snapshot: Snapshot | None = None
) -> tuple[Float[Tensor, "rows dim"], Int16[Tensor, "rows values"]]:
    """Unit vectors and 8×8 pictures of the rows, the latter -1 where there is none.

    Args:
        snapshot: that the rows are of; None for now.
    """
    snapshot = snapshot or store.snapshot()
    vectors = torch.from_numpy(store.embeddings(rows, snapshot)).float()
    pictures, known = store.thumbnails(rows, snapshot)
    wide = pictures.astype(np.int16)
    wide[~known] = -1
    return torch.nn.functional.normalize(vectors, dim=1), torch.from_numpy(wide)


@own_defaults()
def calibrate(store: Store, *, sample: int = 1000, quantile: float = 0.99, seed: int = 0) -> DedupConfig | None:
    """A cosine threshold from the data: of images, at most 1 - quantile lose their nearest *visibly different* neighbor.

    Takes the nearest neighbor that differs in its 8×8 picture, and the quantile of its cosine over a sample of the images
    that have pictures. Never below 0.9, which is the paper's.

    Returns: None where no two images with pictures differ. By their vectors alone, copies cannot be told from neighbors.
    """
    snapshot = store.snapshot()
    rows = _pictured(store, snapshot, 20 * sample, seed + 1)
    draw = np.random.default_rng(seed).permutation(rows)[:sample]
    pool, pool_pictures = gather(store, rows, snapshot)
    nearest: list[float] = []
    for start in range(0, len(draw) if len(rows) > 1 else 0, 64):
        some = draw[start : start + 64]
        vectors, pictures = gather(store, some, snapshot)
        cosines, places = torch.topk(vectors @ pool.T, min(32, len(rows)), dim=1)
        same = duplicates(vectors, pictures, pool[places], pool_pictures[places], DedupConfig(cosine=None))
        same |= torch.from_numpy(rows[places.numpy()] == some[:, None])
        found = cosines.masked_fill(same, -torch.inf).amax(1)
        nearest += found[found.isfinite()].tolist()
    if not nearest:
        return None
    return DedupConfig(cosine=round(float(np.clip(np.quantile(nearest, quantile), FLOOR, CEILING)), 4))


def _pictured(store: Store, snapshot: Snapshot, count: int, seed: int) -> Int[np.ndarray, "some"]:
    """At most so many rows by chance, those of them that have pictures, in order."""
    rows = np.sort(np.random.default_rng(seed).permutation(snapshot.live_rows)[: max(count, 1)])
    return rows[store.thumbnails(rows, snapshot)[1]]
