"""An index after its folder: what is new there, what changed, and what is gone, found first and done when asked to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knn_diffusion.errors import ImageError
from knn_diffusion.image_index.embedding import content_digest
from knn_diffusion.image_index.ingest import AddReport
from knn_diffusion.image_index.metadata_table import Tables
from knn_diffusion.images import SourceImage, find_images
from knn_diffusion.images.find import SUFFIXES, is_container
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval.database import text
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import Store

if TYPE_CHECKING:
    from knn_diffusion.image_index.index import ImageIndex

READ_AT_ONCE = 10_000


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncPlan:
    """What makes an index show what a folder holds; nothing is changed before `apply` is called.

    new      images that the index does not have by their source
    changed  images whose pixels are others now, and the ids of what they replace
    gone     ids and sources of images that are no longer there
    """

    index: ImageIndex
    new: list[SourceImage]
    changed: list[tuple[SourceImage, str]]
    gone: list[tuple[str, str]]

    def apply(self, *, metadata: Tables | None = None, progress: Progress | None = None) -> AddReport:
        """Add what is new and what changed, then remove what is gone and what was replaced.

        Raises: as ImageIndex.add. An image that can no longer be read keeps its earlier state in the index.
        """
        wanted = [*self.new, *(image for image, _ in self.changed)]
        report = self.index.add(wanted, metadata=metadata, progress=progress) if wanted else AddReport()
        unread = {one.source for one in report.skipped}
        replaced = [id_ for image, id_ in self.changed if image.source not in unread]
        there = [id_ for id_ in (*replaced, *(id_ for id_, _ in self.gone)) if id_ in self.index]
        if there:
            self.index.remove(there)
        if (
            there and report.already_present
        ):  # some of them only moved, and what was there of them has just been removed
            moved = self.index.add(wanted, metadata=metadata, progress=progress)
            report.ids += moved.ids
            report.added, report.already_present = report.added + moved.added, report.already_present - moved.added
        return report

    def to_dict(self) -> dict[str, Any]:
        """Counts and sources as plain values, for JSON."""
        return {
            "new": [one.source for one in self.new],
            "changed": [one.source for one, _ in self.changed],
            "gone": [source for _, source in self.gone],
        }


def plan_sync(index: ImageIndex, store: Store, folder: Path, progress: Progress | None = None) -> SyncPlan:
    """Compare a folder with the images of the index that came from it.

    An image under a known source, in a file that is older than the index's copy of it, is taken for unchanged unread.

    Raises: UsageError when the folder holds no image: then its disk may not be there, and nothing is taken for gone.
    """
    found = {text(os.path.abspath(one.source)): one for one in find_images([folder])}
    closed = tuple(
        place for place in found if os.path.isdir(place) or is_container(place)
    )  # what could not be looked into
    known = {
        place: (id_, added_at, content) for place, id_, added_at, content in _known(store, os.path.abspath(folder))
    }
    new, changed = list[SourceImage](), list[tuple[SourceImage, str]]()
    for number, (place, image) in enumerate(found.items(), 1):
        if place in closed:
            continue
        if place not in known:
            new.append(image)
        elif _differs(image, *known[place][1:]):
            changed.append((image, known[place][0]))
        if progress is not None:
            progress("comparing images", number, len(found))
    gone = [
        (id_, place)
        for place, (id_, _, _) in known.items()
        if place not in found and not any(_is_below(place, one) for one in closed)
    ]
    return SyncPlan(index=index, new=new, changed=changed, gone=gone)


def _known(store: Store, folder: str) -> Iterator[tuple[str, str, float, str]]:
    """Source, id, time of adding and content of the index's images that came from a folder."""

    def read(now: Snapshot) -> list[tuple[str, str, float, str]]:
        kept = []
        for start in range(0, len(now.live_rows), READ_AT_ONCE):
            for id_, source, _, content, added_at in store.facts(now.live_rows[start : start + READ_AT_ONCE], now):
                if _names_a_file(source) and _is_below(place := os.path.abspath(source), folder):
                    kept.append((place, id_, added_at, content.hex()))
        return kept

    yield from store.consistently(read)


def _names_a_file(source: str) -> bool:
    """Whether this is no address, nor the name of a picture that was in memory."""
    name = source.partition("::")[0]
    return "://" not in source and (is_container(name) or Path(name).suffix.lower() in SUFFIXES)


def _is_below(place: str, folder: str) -> bool:
    return place.startswith((os.path.join(folder, ""), f"{folder}::")) or place == folder


def _differs(image: SourceImage, added_at: float, content: str) -> bool:
    try:
        if os.stat(image.file).st_mtime < added_at:
            return False
        return content_digest(image.load()) != content
    except (OSError, ImageError):
        return False  # what cannot be read now stays as it was
