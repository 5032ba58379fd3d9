"""What de-duplication of a whole index found: to be shown, written to a table, and removed when that is wanted."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from knn_diffusion.checkpoint import atomic_path
from knn_diffusion.errors import StoreError, UsageError
from knn_diffusion.image_index.upkeep import require_writable
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval.items import Facts
from knn_diffusion.retrieval.near_duplicates import NearDuplicateRule, NearDuplicates, find_near_duplicates
from knn_diffusion.retrieval.segments import CompactedError, Snapshot
from knn_diffusion.retrieval.store import Store

READ_AT_ONCE = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """An image that can go, the one that stays for it, and the cosine of their embeddings."""

    id: str
    kept: str
    cosine: float
    source: str
    kept_source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """An image that stays, how many go for it, and some of those in the order they were added."""

    kept: str
    source: str
    size: int
    copies: tuple[Copy, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DedupReport:
    """The near-duplicates of an index; nothing is removed before `remove` is called.

    Once some of them were removed and compacted away, whatever names images raises StoreError.

    store, snapshot  the images, as they were looked at
    rule             when one image repeats another
    found            rows of the snapshot that can go, and those that stay for them
    removed          told after they were removed
    """

    store: Store
    snapshot: Snapshot
    rule: NearDuplicateRule
    found: NearDuplicates
    removed: Callable[[], None]

    @property
    def count(self) -> int:
        """Images that were looked at."""
        return len(self.snapshot.live_rows)

    @property
    def num_copies(self) -> int:
        """Images that can go."""
        return len(self.found.dropped)

    @property
    def num_groups(self) -> int:
        """Images that stay for others."""
        return len(np.unique(self.found.kept))

    def copies(self) -> Iterator[Copy]:
        """Every image that can go, in the order they were added."""
        for start in range(0, self.num_copies, READ_AT_ONCE):
            yield from self._copies(np.arange(start, min(start + READ_AT_ONCE, self.num_copies)))

    def groups(self, count: int = 10, copies: int = 5) -> list[Group]:
        """The `count` largest groups, of each at most so many copies."""
        kept, sizes = np.unique(self.found.kept, return_counts=True)
        largest = np.argsort(-sizes, kind="stable")[:count]
        shown = []
        for row, size in zip(kept[largest], sizes[largest], strict=True):
            some = tuple(self._copies(np.flatnonzero(self.found.kept == row)[:copies]))
            shown.append(Group(kept=some[0].kept, source=some[0].kept_source, size=int(size), copies=some))
        return shown

    def write(self, path: Path) -> None:
        """Write a table of all copies, one JSON object a line for .jsonl, comma-separated for .csv.

        Raises: UsageError for another suffix; KnnDiffusionError when the disk is full.
        """
        require_table(path)
        options: dict[str, Any] = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
        with atomic_path(path) as temporary, temporary.open("w", **options) as file:
            if path.suffix == ".jsonl":
                file.writelines(json.dumps(asdict(one)) + "\n" for one in self.copies())
                return
            table = csv.DictWriter(file, [field.name for field in fields(Copy)])
            table.writeheader()
            table.writerows(asdict(one) for one in self.copies())

    def remove(self) -> None:
        """Remove the copies, all of them or none; `compact` takes them off the disk.

        Raises: StoreError for a read-only index; UsageError when a copy, or one that stays for it, was removed meanwhile,
            StoreError when it was compacted away too.
        """
        require_writable(self.store)
        self.store.remove(self._ids(self.found.dropped), self._ids(np.unique(self.found.kept)))
        self.removed()

    def to_dict(self) -> dict[str, Any]:
        """Counts and rule as plain values, for JSON."""
        counts = {"count": self.count, "copies": self.num_copies, "groups": self.num_groups}
        return {**counts, **asdict(self.rule), "every_pair": self.found.exact}

    def _ids(self, rows: Int64[np.ndarray, "rows"]) -> list[str]:
        return [facts[0] for facts in self._facts(rows)]

    def _facts(self, rows: Int64[np.ndarray, "rows"]) -> list[Facts]:
        try:
            return self.store.facts(rows, self.snapshot)
        except CompactedError:
            raise StoreError(
                f"{self.store.name} lost images since its copies were looked for (it was compacted): look again"
            ) from None

    def _copies(self, numbers: Int64[np.ndarray, "some"]) -> Iterator[Copy]:
        gone, kept = (self._facts(rows[numbers]) for rows in (self.found.dropped, self.found.kept))
        for one, other, cosine in zip(gone, kept, self.found.cosines[numbers].tolist(), strict=True):
            shown = round(cosine, 6)
            (id_, source), (kept_id, kept_source) = one[:2], other[:2]
            yield Copy(id=id_, kept=kept_id, cosine=shown, source=source, kept_source=kept_source)


def find_copies(
    store: Store,
    rule: NearDuplicateRule,
    *,
    device: str = "cpu",
    progress: Progress | None = None,
    removed: Callable[[], None],
) -> DedupReport:
    """See ImageIndex.dedup.

    Args:
        removed: told after copies were removed.
    """

    def read(now: Snapshot) -> DedupReport:
        found = find_near_duplicates(store, now, rule, device=device, progress=progress)
        return DedupReport(store=store, snapshot=now, rule=rule, found=found, removed=removed)

    return store.consistently(read)


def require_table(path: Path) -> None:
    """Raise UsageError for a file name that says neither .csv nor .jsonl; worth asking before the work."""
    if path.suffix not in (".csv", ".jsonl"):
        raise UsageError(f"expected a .csv or .jsonl file for the table of copies, got {path}: change its name")
