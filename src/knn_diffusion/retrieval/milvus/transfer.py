"""Copy the images of a store into a collection, batch by batch; what is there already is not sent again."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from knn_diffusion.errors import StoreError
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval.milvus.retriever import MAX_NAME, MilvusRetriever
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import Store

BATCH_ROWS = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class PushReport:
    """What became of a push: images sent, present before, in the store, and in the collection at the end."""

    sent: int
    already_present: int
    in_store: int
    in_collection: int


def push(store: Store, retriever: MilvusRetriever, progress: Progress | None = None) -> PushReport:
    """Send every image that the collection does not have; after a failure, push again and it goes on.

    Images that were removed from the store since an earlier push stay in the collection.

    Raises: UsageError when an id stands for other content there; StoreError when the server fails, or holds fewer images
        at the end than the store.
    """
    sent = 0

    def send(snapshot: Snapshot) -> int:
        nonlocal sent
        total, seen = len(snapshot.live_rows), 0
        for run in snapshot.runs() if total else ():
            for rows in (run[start : start + BATCH_ROWS] for start in range(0, len(run), BATCH_ROWS)):
                pictures, known = store.thumbnails(rows, snapshot)
                added = retriever.add(
                    store.items(rows, snapshot),
                    store.embeddings(rows, snapshot),
                    pictures if known.all() else None,
                    added_at=np.array([added_at for *_, added_at in store.facts(rows, snapshot)], np.float64),
                    positions=snapshot.records.of_rows(rows),
                    flush=False,
                )
                seen, sent = seen + len(rows), sent + int(added.sum())
                if progress is not None:
                    progress("pushing images", seen, total)
        return total

    total = store.consistently(send)  # after a compaction from the start; what was sent stays
    retriever.flush()
    count = len(retriever)
    if count < total:
        raise StoreError(
            f"expected at least {total} images in {retriever.name} after the push, found {count}: push again, "
            "and let nothing remove images meanwhile"
        )
    return PushReport(sent=sent, already_present=total - sent, in_store=total, in_collection=count)


def collection_name(name: str) -> str:
    """A name that Milvus takes, made from any."""
    plain = re.sub(r"\W", "_", name, flags=re.ASCII)[: MAX_NAME - 1]
    return plain if plain and not plain[0].isdigit() else f"_{plain}"
