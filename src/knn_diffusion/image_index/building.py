"""Images into a store: a build, one that goes on after an interruption, and what is added later."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from knn_diffusion.device import own_defaults
from knn_diffusion.errors import UsageError
from knn_diffusion.image_index.distributed import RayConfig, embed_on_ray
from knn_diffusion.image_index.embedding import Group, embed_groups
from knn_diffusion.image_index.encoder import IndexEncoder
from knn_diffusion.image_index.ingest import AddReport, Images, Writer, find_sources
from knn_diffusion.image_index.metadata_table import Tables, match_tables
from knn_diffusion.image_index.settings import new_store, preview_side, settle_rule
from knn_diffusion.image_index.tokenizing import Recorder, TokenOutput
from knn_diffusion.models.encoders import JointEncoder
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval.identity import DATABASE
from knn_diffusion.retrieval.store import EncoderIdentity, Store

BUILDING = "building"
"""The setting that says that a build is not complete."""


def begin(path: Path | None, encoder: EncoderIdentity, *, resume: bool) -> Store:
    """The store to build into: a new one, or with `resume` that of a build which was interrupted in this folder.

    Raises: UsageError when the folder holds anything else.
    """
    if path is not None:
        require_utf8(path)
    if resume and path is not None and (store := _interrupted(path)) is not None:
        return store
    store = new_store(path, encoder)
    store.set_setting(BUILDING, "yes")
    return store


def require_utf8(path: Path) -> None:
    """Raise UsageError for a folder whose name is no text: files in it cannot be mapped into memory."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        shown = str(path).encode("utf-8", "backslashreplace").decode()
        raise UsageError(
            f"expected a folder whose name is UTF-8 for the index, got {shown}: choose another name"
        ) from None


def complete(store: Store, encoder: JointEncoder) -> None:
    """End a build, also one that was interrupted; its rule is settled now that all images are there."""
    if len(store):
        settle_rule(store, encoder)
        if store.setting(BUILDING):
            store.set_setting(BUILDING, "")


@contextmanager
def filling(store: Store, *, new: bool = True) -> Iterator[None]:
    """Close the store when filling it fails, and take a new one away again if nothing came into it."""
    try:
        yield
    except BaseException:
        empty = not len(store)
        store.close()
        if new and empty and store.folder is not None:
            (store.folder / DATABASE).unlink(missing_ok=True)
            shutil.rmtree(store.folder / "segments")
            store.folder.rmdir()
        raise


@own_defaults()
def add(
    store: Store,
    encoder: IndexEncoder,
    images: Images,
    metadata: Tables | None = None,
    *,
    previews: bool,
    ray: RayConfig | None,
    tokens: TokenOutput | None,
    progress: Progress | None,
) -> AddReport:
    """See ImageIndex.add."""
    found = find_sources(images)
    writer = Writer(store, match_tables(metadata, found) if metadata is not None else None)
    recorder, tokenize = None, None
    groups = [Group(found)]
    if tokens is not None:
        folder, tokenize = tokens.opened(encoder.load())
        recorder = Recorder(folder, found, store)
        groups = recorder.groups
        writer.report.already_present += len(found) - sum(len(group.images) for group in groups)
    total, told = sum(len(group.images) for group in groups), progress or (lambda what, done, total: None)
    told("adding images", 0, total)
    side = preview_side(store) if previews else None
    if ray is None:
        outcomes = embed_groups(groups, encoder.load(), side, writer.known, tokenize)
    else:
        outcomes = embed_on_ray(groups, encoder.load(), store, side, ray, tokenize)
    with closing(outcomes):
        try:
            for number, outcome in enumerate(outcomes, 1):
                writer.take(outcome)
                if recorder is not None and recorder.take(outcome):
                    writer.commit()
                    recorder.keep()
                told("adding images", number, total)
        finally:
            writer.commit()
    if recorder is not None:
        recorder.finish()
    return writer.report


def _interrupted(path: Path) -> Store | None:
    """The store of a build that was begun in this folder and is not complete."""
    if not (path / DATABASE).is_file():
        return None
    store = Store.open(path)
    if store.setting(BUILDING) and not store.read_only:
        return store
    store.close()
    return None
