"""Images into the rows of a store: what was found, what became of it, saved many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from knn_diffusion import images as pictures
from knn_diffusion.image_index.embedding import Outcome, Row, Skipped
from knn_diffusion.image_index.hints import Hint, Hinted
from knn_diffusion.image_index.metadata_table import Matched
from knn_diffusion.images import SourceImage
from knn_diffusion.retrieval.store import Store

COMMIT_IMAGES = 512
"""Images saved together."""

Images = str | Path | Image.Image | Sequence[str | Path | Image.Image | SourceImage]


@dataclass(kw_only=True, slots=True)
class AddReport:
    """What became of the images given to `add` or `build`."""

    added: int = 0
    already_present: int = 0
    skipped: list[Skipped] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    """Ids of the images added, in their order."""
    hints: dict[Hint, Hinted] = field(default_factory=dict)
    """What is odd about some of those added (`image_index.hints`)."""
    unmatched_rows: int = 0
    """Rows of the tables of metadata that tell of none of the images, or of several."""
    unmatched_reasons: list[str] = field(default_factory=list)
    """Why the first of these rows do."""


class Writer:
    """What becomes of images on its way into the store, saved many at a time."""

    def __init__(self, store: Store, told: Matched | None = None) -> None:
        self._told = told or Matched(metadata={})
        self.report = AddReport(unmatched_rows=self._told.unmatched, unmatched_reasons=list(self._told.reasons))
        self._store = store
        self._ready: dict[str, Row] = {}

    def known(self, source: SourceImage, content: str) -> str | None:
        """The digest, if the image with it is in the store, or about to be."""
        there = content in self._ready or self._store.id_of_content(content) is not None
        return content if there else None

    def take(self, outcome: Outcome) -> None:
        """Note one image, and save when enough have come together."""
        if isinstance(outcome, Skipped):
            self.report.skipped.append(outcome)
        elif not isinstance(outcome, Row) or outcome.item.content in self._ready:
            self.report.already_present += 1
        else:
            self._ready[outcome.item.content] = outcome
        if len(self._ready) >= COMMIT_IMAGES:
            self.commit()

    def commit(self) -> None:
        """Save what has come together."""
        ready, self._ready = list(self._ready.values()), {}
        if not ready:
            return
        vectors, thumbnails = np.stack([row.vector for row in ready]), np.stack([row.thumbnail for row in ready])
        items = [replace(row.item, metadata=self._told.metadata.get(row.item.source, {})) for row in ready]
        added = self._store.append(items, vectors, thumbnails, [row.preview for row in ready])
        self.report.added += int(added.sum())
        self.report.already_present += int((~added).sum())
        ids = (self._store.id_of_content(row.item.content) for row, new in zip(ready, added, strict=True) if new)
        self.report.ids += [one for one in ids if one is not None]
        for row in (row for row, new in zip(ready, added, strict=True) if new):
            for hint in row.hints:
                before = self.report.hints.get(hint, Hinted(count=0, first=row.item.source))
                self.report.hints[hint] = replace(before, count=before.count + 1)


def find_sources(images: Images) -> list[SourceImage]:
    """Pictures as they are; paths as the images found there, each file once.

    Raises: UsageError when a path does not exist or nothing is found.
    """
    given = [images] if isinstance(images, str | Path | Image.Image) else list(images)
    paths = [one for one in given if isinstance(one, str | Path)]
    found = pictures.find_images(paths) if paths or not given else []
    return found + [_as_source(one, number) for number, one in enumerate(given) if not isinstance(one, str | Path)]


def _as_source(one: Image.Image | SourceImage, number: int) -> SourceImage:
    if isinstance(one, SourceImage):
        return one
    return SourceImage(f"picture {number}", str(number), lambda: pictures.open_image(one))
