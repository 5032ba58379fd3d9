"""What an index tells of itself: how many images, which, where they came from, and whether it is sound."""

from __future__ import annotations

import io
import os
from base64 import b64encode
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float16
from PIL import Image

from knn_diffusion.config import to_dict
from knn_diffusion.errors import StoreError
from knn_diffusion.image_index import catalog
from knn_diffusion.image_index.encoder import IndexEncoder
from knn_diffusion.image_index.settings import preview_side, stored_framing
from knn_diffusion.models.encoders import JointEncoder
from knn_diffusion.retrieval.dedup import DedupConfig
from knn_diffusion.retrieval.index import LocalRetriever
from knn_diffusion.retrieval.kept import cache_problem
from knn_diffusion.retrieval.metadata import Value
from knn_diffusion.retrieval.plan import Plan
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import Store

SHOWN = 24
"""Images of an index that a notebook shows."""


def _inline(picture: Image.Image) -> str:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return f'<img src="data:image/png;base64,{b64encode(content.getvalue()).decode()}" style="margin: 2px">'


class IndexFacts:
    """The side of an `ImageIndex` that reads and changes nothing."""

    def __init__(self, store: Store, encoder: IndexEncoder, retriever: LocalRetriever) -> None:
        self._store, self._encoder, self._retriever = store, encoder, retriever

    def __len__(self) -> int:
        return len(self._store)

    def __repr__(self) -> str:
        made = self._store.encoder
        return f"<ImageIndex {self._store.name}: {len(self):,} images, {made.dim} numbers each by {made.name}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: the line of `repr`, and the first images that have previews."""
        shown = [picture for one in self._first_ids(SHOWN) if (picture := self.preview(one)) is not None]
        return f"<p>{escape(repr(self))}</p>" + "".join(map(_inline, shown))

    def _first_ids(self, count: int) -> list[str]:
        def read(now: Snapshot) -> list[str]:
            return [facts[0] for facts in self._store.facts(now.live_rows[:count], now)]

        return self._store.consistently(read)

    def __contains__(self, id_: object) -> bool:
        return isinstance(id_, str) and bool(self._store.rows_of([id_])[0] >= 0)

    @property
    def encoder(self) -> JointEncoder:
        """The joint encoder of the index, loaded when first asked for.

        Raises: FingerprintError when the one of that name or place is another; UsageError when there is none.
        """
        return self._encoder.load()

    @property
    def retriever(self) -> LocalRetriever:
        """What searches the store; to measure and to build upon."""
        return self._retriever

    @property
    def folder(self) -> Path | None:
        """Where the images are kept, None for an index in memory."""
        return self._store.folder

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self._store.encoder.dim

    @property
    def rule(self) -> DedupConfig:
        """When two images count as the same picture."""
        return self._retriever.rule

    @property
    def framing(self) -> str | None:
        """Name of the rule by which pictures are framed, None in an index that was built before there was one."""
        return stored_framing(self._store)

    @property
    def read_only(self) -> bool:
        """Whether changes stay in memory."""
        return self._store.read_only

    @property
    def ids(self) -> list[str]:
        """The id of every image, in the order of `embeddings`."""
        return catalog.ids(self._store)

    @property
    def embeddings(self) -> Float16[np.ndarray, "items dim"]:
        """The stored unit vector of every image, in the order they were added."""
        snapshot = self._store.snapshot()
        return self._store.embeddings(snapshot.live_rows, snapshot)

    @property
    def digest(self) -> str:
        """Changes whenever the images, their order, or the rule of de-duplication do."""
        return catalog.digest(self._store, self._store.snapshot(), self.rule)

    def sources(self, ids: Sequence[str]) -> list[str]:
        """Where the images came from. Raises: UsageError for an unknown id."""
        return catalog.sources(self._store, ids)

    def source(self, id_: str) -> str:
        """Where an image came from. Raises: UsageError for an unknown id."""
        return self.sources([id_])[0]

    def metadata(self, ids: Sequence[str]) -> list[dict[str, Value]]:
        """What is known of the images beside their sources, by name. Raises: UsageError for an unknown id."""
        return catalog.metadata(self._store, ids)

    def ids_where(self, condition: str) -> list[str]:
        """The ids of the images that fulfil a condition as in `search`, in the order they were added.

        Raises: UsageError when it is no condition.
        """

        def read(now: Snapshot) -> list[str]:
            return [facts[0] for facts in self._store.facts(np.flatnonzero(self._store.matching(condition, now)), now)]

        return self._store.consistently(read)

    def ids_from(self, place: str | Path) -> list[str]:
        """The ids of the images that came from a file, or from anything in a folder, a shard or a table."""
        places = {str(place), os.path.normpath(place), os.path.abspath(place)}
        with suppress(ValueError):  # on another disk of Windows
            places.add(os.path.relpath(place))
        texts = [f"'{one.replace(chr(39), chr(39) * 2)}'" for one in sorted(places)]
        starts = [
            f"substr(source, 1, {len(one + end)}) = {text[:-1]}{end}'"
            for one, text in zip(sorted(places), texts, strict=True)
            for end in (os.sep, "::")
        ]
        return self.ids_where(" OR ".join([f"source IN ({', '.join(texts)})", *starts]))

    def preview(self, id_: str) -> Image.Image | None:
        """The framed picture, RGBA where something shows through it, `preview_side` pixels across; None when added without.

        Raises: UsageError for an unknown id; StoreError when what is stored is no such picture.
        """
        return catalog.preview(self._store, id_)

    def plan(self) -> Plan:
        """How the index is searched at its size, and the memory that takes."""
        return self._retriever.plan()

    def info(self) -> dict[str, Any]:
        """Facts to show: count, dim, encoder, fingerprint, framing, preview_side, engine, bytes, dedup, read_only."""
        made = self._store.encoder
        return {
            "count": len(self),
            "dim": made.dim,
            "encoder": made.name,
            "fingerprint": made.fingerprint,
            "framing": self.framing,
            "preview_side": preview_side(self._store),
            "engine": self.plan().engine,
            "bytes": self._store.bytes_on_disk(),
            "dedup": to_dict(self.rule),
            "read_only": self.read_only,
        }

    def check(self) -> None:
        """Verify every digest and count. Raises: StoreError listing all that is wrong."""
        found = self._store.problems()
        if self._store.folder is not None and (problem := cache_problem(self._store.folder)):
            found.append(problem)
        if found:
            raise StoreError(
                f"{self._store.name} is not sound: {'; '.join(found)}: restore a copy or build the index again"
            )
