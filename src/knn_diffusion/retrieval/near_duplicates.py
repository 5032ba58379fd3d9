"""Near-duplicates in a whole index: which images repeat one that was added before them and is kept.

Greedy, the first one stays (the leader algorithm of clustering): an image goes if and only if it shows the same picture as
an earlier one that stays. So each image that goes has one that stays for it. Connected components would go on from copy
to copy of a copy, and in dense regions delete half of everything.

An image is decided once all earlier ones that it repeats are. Cells can therefore be taken in any order, those with open
images again, until none is open: one answer comes out whatever the order. Pairs are never collected, however many there
are; memory is a few bytes an image, beside the layout of the cells.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float16, Float64, Int, Int64, UInt8

from knn_diffusion.config import config, require
from knn_diffusion.device import own_defaults
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval import neighbors
from knn_diffusion.retrieval.cell_join import CellLayout, lay_out, unit_tensor
from knn_diffusion.retrieval.dedup import DedupConfig
from knn_diffusion.retrieval.segments import THUMBNAIL_VALUES, Snapshot
from knn_diffusion.retrieval.store import Store

CAUTIOUS = 0.95
"""The least cosine that images are deleted by unless another is asked for."""
QUERY_ROWS, ITEM_ROWS, PAIRS = 512, 8192, 16_384
"""Images held against how many others at once, and pairs looked at closely at once."""
OPEN, KEPT, DROPPED = 0, 1, 2
_SLACK = 1e-4  # more than a product of unit vectors in float32 can be wrong


@config
class NearDuplicateRule:
    """When an image repeats another so closely that it can be deleted: by embedding and, where there are any, by picture.

    A neighbor list drops what either of its two rules calls a copy (`DedupConfig`); what is deleted must satisfy both.

    threshold  at or above this cosine of their embeddings, in (0, 1]
    manhattan  and at or below this mean absolute difference of their 8×8 pictures, in levels of 0 … 255; 255 believes the
               embeddings. Where one has no picture, the embeddings alone decide
    """

    threshold: float = CAUTIOUS
    manhattan: float = 2.0

    def __post_init__(self) -> None:
        require(0 < self.threshold <= 1, "threshold", self.threshold, "in (0, 1]")
        require(0 <= self.manhattan <= 255, "manhattan", self.manhattan, "in 0 … 255")

    @classmethod
    def stricter_than(cls, lists: DedupConfig) -> NearDuplicateRule:
        """From the rule of the neighbor lists, which belongs to the encoder: half as far from 1, and at least 0.95."""
        cosine = CAUTIOUS if lists.cosine is None else (1 + lists.cosine) / 2
        return cls(threshold=max(cosine, CAUTIOUS), manhattan=2.0 if lists.manhattan is None else lists.manhattan)


@dataclass(frozen=True, kw_only=True, slots=True)
class NearDuplicates:
    """Rows of a snapshot that repeat others, in the order they were added.

    dropped   rows that can go
    kept      for each the row that stays for it: of those added before it that stay, the nearest
    cosines   of the two embeddings
    exact     whether every pair was compared
    """

    dropped: Int64[np.ndarray, "copies"]
    kept: Int64[np.ndarray, "copies"]
    cosines: Float64[np.ndarray, "copies"]
    exact: bool


@own_defaults()
def find_near_duplicates(
    store: Store,
    snapshot: Snapshot,
    rule: NearDuplicateRule,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> NearDuplicates:
    """The images of the snapshot that repeat an earlier one which stays. Deterministic, changes nothing.

    Up to `neighbors.EVERY_PAIR` images every pair is compared; beyond, those in near cells (`cell_join`).

    Raises: StoreError when the store is damaged.
    """
    rows = snapshot.live_rows
    exact = len(rows) <= neighbors.EVERY_PAIR
    layout = _one_cell(store.embeddings(rows, snapshot)) if exact else lay_out(store, snapshot, None, progress)
    comparison = _Comparison(
        store=store, snapshot=snapshot, rows=rows, rule=rule, layout=layout, device=torch.device(device)
    )
    state = _decide(comparison, progress)
    return _matched(comparison, state, exact, progress)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Comparison:
    """The images, cell by cell, and when two of them are the same. A position is one in the layout, a place one in `rows`."""

    store: Store
    snapshot: Snapshot
    rows: Int[np.ndarray, "items"]
    rule: NearDuplicateRule
    layout: CellLayout
    device: torch.device

    @property
    def cells(self) -> list[int]:
        """Those with images, by their earliest: where many repeat each other, the first of all is soon known to stay."""
        bounds = self.layout.bounds
        filled = np.flatnonzero(np.diff(bounds))
        return filled[np.argsort(self.layout.order[bounds[filled]])].tolist()

    def blocks(
        self, wanted: Bool[np.ndarray, "items"]
    ) -> Iterator[tuple[Int[np.ndarray, "own"], Int[np.ndarray, "others"]]]:
        """Positions of wanted images, some of a cell at a time in the order they were added, and what to hold them against."""
        for cell in self.cells:
            own = self.layout.members(cell)
            own = own[wanted[self.layout.order[own]]]
            others = self.layout.candidates(cell) if len(own) else own
            for start in range(0, len(own), QUERY_ROWS):
                yield own[start : start + QUERY_ROWS], others

    def repeats(
        self, own: Int[np.ndarray, "own"], others: Int[np.ndarray, "others"]
    ) -> Iterator[tuple[Int64[np.ndarray, "pairs"], Int64[np.ndarray, "pairs"], Float64[np.ndarray, "pairs"]]]:
        """Pairs of one of `own` and an earlier one of `others` that are the same: their numbers there, and the cosine."""
        places, queries = self.layout.order[own], unit_tensor(self.layout.vectors[own], self.device)
        for start in range(0, len(others), ITEM_ROWS):
            some = others[start : start + ITEM_ROWS]
            close = queries @ unit_tensor(self.layout.vectors[some], self.device).T >= self.rule.threshold - _SLACK
            one, other = np.nonzero(close.cpu().numpy() & (self.layout.order[some] < places[:, None]))
            for first in range(0, len(one), PAIRS):
                a, b = one[first : first + PAIRS], other[first : first + PAIRS]
                seen = self._look_alike(own[a], some[b])
                a, b = a[seen], b[seen]
                cosines = _exact_cosines(self.layout.vectors[own[a]], self.layout.vectors[some[b]])
                same = cosines >= self.rule.threshold
                yield a[same], b[same] + start, cosines[same]

    def _look_alike(self, one: Int[np.ndarray, "pairs"], other: Int[np.ndarray, "pairs"]) -> Bool[np.ndarray, "pairs"]:
        """Whether their 8×8 pictures are the same, as far as both are known."""
        (first, has_first), (second, has_second) = (
            self.store.thumbnails(self.rows[self.layout.order[some]], self.snapshot) for some in (one, other)
        )
        distance = np.abs(first.astype(np.int16) - second).sum(1)
        return ~(has_first & has_second) | (distance <= self.rule.manhattan * THUMBNAIL_VALUES)


def _decide(comparison: _Comparison, progress: Progress | None) -> UInt8[np.ndarray, "items"]:
    """For each place KEPT or DROPPED."""
    order, state = comparison.layout.order, np.full(len(comparison.rows), OPEN, np.uint8)
    matters, decided = np.ones(len(state), bool), 0
    while (pending := state == OPEN).any():
        for own, others in comparison.blocks(pending):
            places = order[others]
            before = others[matters[places] & (places < order[own[-1]])]
            _decide_block(comparison, state, own, np.setdiff1d(before, own, assume_unique=True))
            decided += int((state[order[own]] != OPEN).sum())
            if progress is not None:
                progress("comparing images", decided, len(state))
        matters = pending  # what was decided before this pass was seen in it
    return state


def _decide_block(
    comparison: _Comparison,
    state: UInt8[np.ndarray, "items"],
    own: Int[np.ndarray, "own"],
    others: Int[np.ndarray, "others"],
) -> None:
    """Decide what can be decided now: what repeats an image that is still open itself stays open."""
    order = comparison.layout.order
    known = state[order[others]]
    repeats = _repeating(comparison, own, others[known == KEPT])
    state[order[own[repeats]]] = DROPPED
    left = own[~repeats]
    waits = _repeating(comparison, left, others[known == OPEN])
    within = np.zeros((len(left), len(left)), bool)
    for one, other, _ in comparison.repeats(left, left):
        within[one, other] = True
    verdict = np.full(len(left), KEPT, np.uint8)
    for number in np.flatnonzero(waits | within.any(1)):
        before = verdict[within[number]]
        if (before == KEPT).any():
            verdict[number] = DROPPED
        elif waits[number] or (before == OPEN).any():
            verdict[number] = OPEN
    state[order[left]] = verdict


def _repeating(
    comparison: _Comparison, own: Int[np.ndarray, "own"], others: Int[np.ndarray, "others"]
) -> Bool[np.ndarray, "own"]:
    """Which of `own` are the same as any earlier one of `others`."""
    found = np.zeros(len(own), bool)
    for one, _, _ in comparison.repeats(own, others):
        found[one] = True
    return found


def _matched(
    comparison: _Comparison, state: UInt8[np.ndarray, "items"], exact: bool, progress: Progress | None
) -> NearDuplicates:
    """Find for each image that goes the one that stays for it."""
    order, gone, done = comparison.layout.order, state == DROPPED, 0
    nearest, cosines, total = np.full(len(state), -1, np.int64), np.zeros(len(state)), int(gone.sum())
    for own, others in comparison.blocks(gone):
        places = order[others]
        left = others[(state[places] == KEPT) & (places < order[own[-1]])]
        for one, other, found in comparison.repeats(own, left):
            copies, kept = order[own[one]], order[left[other]]
            ranked = np.lexsort((kept, -found, copies))
            best = ranked[np.unique(copies[ranked], return_index=True)[1]]
            copy, cosine = copies[best], found[best]
            better = (cosine > cosines[copy]) | ((cosine == cosines[copy]) & (kept[best] < nearest[copy]))
            nearest[copy[better]], cosines[copy[better]] = kept[best][better], cosine[better]
        done += len(own)
        if progress is not None:
            progress("matching copies", done, total)
    rows = comparison.rows
    return NearDuplicates(dropped=rows[gone], kept=rows[nearest[gone]], cosines=cosines[gone], exact=exact)


def _one_cell(vectors: Float16[np.ndarray, "items dim"]) -> CellLayout:
    """All images in one cell, so that every pair is compared."""
    count = len(vectors)
    return CellLayout(
        order=np.arange(count), bounds=np.array([0, count]), vectors=vectors, neighbors=np.zeros((1, 1), np.int64)
    )


def _exact_cosines(
    one: Float16[np.ndarray, "pairs dim"], other: Float16[np.ndarray, "pairs dim"]
) -> Float64[np.ndarray, "pairs"]:
    """Sums of products of float16 numbers below 1 are exact in float64, so that no order of work can change a cosine."""
    one_wide, other_wide = one.astype(np.float64), other.astype(np.float64)
    squares = np.einsum("pd,pd->p", one_wide, one_wide) * np.einsum("pd,pd->p", other_wide, other_wide)
    return np.einsum("pd,pd->p", one_wide, other_wide) / np.sqrt(squares)
