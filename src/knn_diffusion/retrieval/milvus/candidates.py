"""From Milvus's candidates to exactly K neighbors: ranked by the stored vectors, without the excluded and without copies."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float16, Float32, Int16

from knn_diffusion.retrieval.dedup import DedupConfig, duplicates, first_different
from knn_diffusion.retrieval.milvus.collection import METRIC, OUTPUT, VECTOR, VectorIndex, stored_picture, stored_vector
from knn_diffusion.retrieval.milvus.condition import quoted
from knn_diffusion.retrieval.milvus.connection import Connection
from knn_diffusion.retrieval.plan import Reach
from knn_diffusion.retrieval.ranking import SPARE, cosines
from knn_diffusion.shapes import Neighbors

MAX_FETCH = 16_384
"""Candidates of one request, a limit of Milvus's."""
_MAX_VALUES = 2**23  # of vectors in one answer


@dataclass(slots=True)
class Candidates:
    """What was found for one query so far, and the places of those chosen."""

    ids: list[str] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    vectors: list[Float16[np.ndarray, "dim"]] = field(default_factory=list)
    pictures: list[Int16[np.ndarray, "values"]] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def take(self, hits: Sequence[Any]) -> None:
        """Add one answer of Milvus's."""
        for hit in hits:
            entity = hit["entity"]
            self.ids.append(str(hit["id"]))
            self.positions.append(int(entity["position"]))
            self.vectors.append(stored_vector(entity[VECTOR]))
            self.pictures.append(stored_picture(entity["thumbnail"]))

    def choose(
        self,
        unit: Float32[np.ndarray, "dim"],
        k: int,
        excluded: Collection[str],
        rule: DedupConfig,
        drop_copies: bool,
    ) -> None:
        """Choose the best k, equal ones in the order they were added."""
        if not self.ids:
            return
        stored = np.stack(self.vectors)
        scores = cosines(stored[None], unit[None])[0]
        order = np.lexsort((np.array(self.ids), np.array(self.positions), -scores))
        order = order[[self.ids[place] not in excluded for place in order]]
        vectors = torch.nn.functional.normalize(torch.from_numpy(stored[order]).float(), dim=1)[None]
        pictures = torch.from_numpy(np.stack(self.pictures)[order])[None]
        valid = torch.ones(1, len(order), dtype=torch.bool)
        if drop_copies:
            unknown = torch.full((1, pictures.shape[2]), -1, dtype=torch.int16)
            valid &= ~duplicates(torch.from_numpy(unit)[None], unknown, vectors, pictures, rule)
        places = (
            first_different(vectors, pictures, valid, min(k, len(order)), rule)[0] if len(order) else torch.zeros(0)
        )
        self.chosen = [int(order[place]) for place in places.tolist() if place >= 0]
        self.scores = [float(scores[place]) for place in self.chosen]


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """One call of `search`: where it looks and by which rules."""

    connection: Connection
    collection: str
    index: VectorIndex
    consistency: str
    expression: str
    reach: Reach
    rule: DedupConfig
    drop_copies: bool

    def run(
        self, units: Float32[np.ndarray, "queries dim"], k: int, excluded: Sequence[Collection[str]]
    ) -> list[Candidates]:
        """Look once for all queries together, then further for each that is short."""
        found = [Candidates() for _ in units]
        fetch = min(2 * k + SPARE + max((len(ids) for ids in excluded), default=0), MAX_FETCH)
        for queries in self._together(len(units), fetch, units.shape[1]):
            answers = self._ask(units[queries], fetch, self.reach, self.expression)
            for query, hits in zip(range(*queries.indices(len(units))), answers, strict=True):
                found[query].take(hits)
                found[query].choose(units[query], k, excluded[query], self.rule, self.drop_copies)
                if len(found[query].chosen) < k:
                    self._look_further(found[query], units[query], k, excluded[query], len(hits) < fetch, fetch)
        return found

    def _together(self, count: int, fetch: int, dim: int) -> Iterator[slice]:
        step = max(1, _MAX_VALUES // (fetch * dim))
        return (slice(start, start + step) for start in range(0, count, step))

    def _look_further(
        self,
        found: Candidates,
        unit: Float32[np.ndarray, "dim"],
        k: int,
        excluded: Collection[str],
        exhausted: bool,
        fetch: int,
    ) -> None:
        """Ask for what was not found yet, twice as many and twice as far each time, until k remain or nothing is left."""
        effort = 1
        while len(found.chosen) < k and not (exhausted and self.index.looks_everywhere(self.reach.times(effort))):
            fetch, effort = min(2 * fetch, MAX_FETCH), 2 * effort
            seen = ", ".join(quoted(one) for one in sorted({*found.ids, *excluded}))
            others = f"id not in [{seen}]" if seen else ""
            expression = " and ".join(part for part in (self.expression, others) if part)
            (hits,) = self._ask(unit[None], fetch, self.reach.times(effort), expression)
            exhausted = len(hits) < fetch
            found.take(hits)
            found.choose(unit, k, excluded, self.rule, self.drop_copies)

    def _ask(
        self, units: Float32[np.ndarray, "queries dim"], fetch: int, reach: Reach, expression: str
    ) -> Sequence[Sequence[Any]]:
        kind = np.float32 if self.connection.lite else np.float16
        return self.connection.call(
            "search",
            collection_name=self.collection,
            data=list(units.astype(kind)),
            anns_field=VECTOR,
            limit=fetch,
            filter=expression,
            output_fields=OUTPUT,
            search_params={"metric_type": METRIC, "params": self.index.search_parameters(reach, fetch)},
            consistency_level=self.consistency,
        )


def answer(found: Sequence[Candidates], k: int, dim: int) -> Neighbors:
    """Ids, scores and stored embeddings of what was chosen, and how many are missing."""
    scores = np.zeros((len(found), k), np.float32)
    embeddings = np.zeros((len(found), k, dim), np.float32)
    ids: list[list[str]] = []
    for query, one in enumerate(found):
        count = len(one.chosen)
        scores[query, :count] = one.scores
        embeddings[query, :count] = [one.vectors[place] for place in one.chosen] if count else 0
        ids.append([one.ids[place] for place in one.chosen] + [""] * (k - count))
    shortfall = np.array([k - len(one.chosen) for one in found], np.int64)
    return Neighbors(ids=ids, scores=scores, embeddings=embeddings, shortfall=shortfall)
