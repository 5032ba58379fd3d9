"""What is said of an index's near-duplicates: which images repeat which, as a table, and as a picture to look at."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from knn_diffusion.checkpoint import atomic_path, atomic_write_bytes
from knn_diffusion.errors import UsageError
from knn_diffusion.images import grid
from knn_diffusion.retrieval.near_duplicates import NearDuplicateRule, find_near_duplicates
from knn_diffusion.retrieval.neighbors import Progress
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import Store

SHOWN_GROUPS, SHOWN_COPIES = 12, 7
CELL = 96


@dataclass(frozen=True, kw_only=True, slots=True)
class Copy:
    """An image that repeats one added before it, and the cosine of their embeddings."""

    id: str
    source: str
    kept_id: str
    kept_source: str
    cosine: float


@dataclass(frozen=True, kw_only=True, slots=True)
class NearDuplicateReport:
    """What `ImageIndex.dedup` found.

    images    how many were compared
    copies    those that can go, in the order they were added
    rule      when one image repeats another
    exact     whether every pair was compared; among very many only those in near cells are
    removed   whether the copies were removed
    """

    images: int
    copies: list[Copy]
    rule: NearDuplicateRule
    exact: bool
    removed: bool = False

    @property
    def groups(self) -> list[list[Copy]]:
        """The copies by the image that stays for them, the largest group first."""
        by_kept: dict[str, list[Copy]] = {}
        for copy in self.copies:
            by_kept.setdefault(copy.kept_id, []).append(copy)
        return sorted(by_kept.values(), key=len, reverse=True)

    def write_table(self, path: Path) -> None:
        """A JSON object a line for each copy. Raises: KnnDiffusionError when the disk is full or not writable."""
        lines = "".join(json.dumps(asdict(copy), ensure_ascii=False) + "\n" for copy in self.copies)
        atomic_write_bytes(path, lines.encode())

    def write_picture(self, path: Path, preview: Callable[[str], Image.Image | None]) -> None:
        """The largest groups, a row each: the image that stays, then those that repeat it.

        Args:
            path: its ending says the format.
            preview: an image's small picture by its id.

        Raises: UsageError when there is nothing to show; KnnDiffusionError when it cannot be written.
        """
        blank = Image.new("RGB", (CELL, CELL), "white")
        groups = self.groups[:SHOWN_GROUPS]
        columns = 1 + min(max(map(len, groups), default=0), SHOWN_COPIES)
        cells: list[Image.Image] = []
        labels: list[str] = []
        for group in groups:
            shown = group[:SHOWN_COPIES]
            row = [preview(group[0].kept_id), *(preview(copy.id) for copy in shown)]
            said = [f"stays for {len(group)}", *(f"{copy.cosine:.4f}" for copy in shown)]
            missing = columns - len(row)
            cells += [picture or blank for picture in row] + [blank] * missing
            labels += said + [""] * missing
        if not cells:
            raise UsageError("expected near-duplicates to draw, there are none: leave the picture out")
        sheet = grid(cells, columns=columns, cell=CELL, labels=labels)
        with atomic_path(path) as temporary:
            sheet.save(temporary, format=_format(path))


def report_near_duplicates(store: Store, rule: NearDuplicateRule, progress: Progress | None) -> NearDuplicateReport:
    """Find near-duplicates and name them. Raises: StoreError when the store is damaged."""

    def read(now: Snapshot) -> NearDuplicateReport:
        found = find_near_duplicates(store, now, rule, progress=progress)
        pairs = zip(store.items(found.dropped, now), store.items(found.kept, now), found.cosines.tolist(), strict=True)
        copies = [
            Copy(id=one.id, source=one.source, kept_id=kept.id, kept_source=kept.source, cosine=cosine)
            for one, kept, cosine in pairs
        ]
        return NearDuplicateReport(images=len(now.live_rows), copies=copies, rule=rule, exact=found.exact)

    return store.consistently(read)


def _format(path: Path) -> str:
    known = Image.registered_extensions()
    if path.suffix.lower() not in known:
        raise UsageError(f"expected a picture's name such as copies.png, got {path.name}: end it in .png or .jpg")
    return known[path.suffix.lower()]
