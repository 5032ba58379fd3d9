"""Embeddings from files into an index: whose they are, and which index they may go into."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from knn_diffusion.errors import FingerprintError, StoreError, UsageError
from knn_diffusion.image_index.building import filling, require_utf8
from knn_diffusion.image_index.encoder import NOT_AT_HAND, AnyEncoder, identity_of, keep_place, loaded
from knn_diffusion.image_index.settings import new_store, settle_rule
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval.identity import DATABASE
from knn_diffusion.retrieval.interchange import ImportReport, VectorFiles, import_vectors
from knn_diffusion.retrieval.store import EncoderIdentity, Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What the caller says of the encoder: itself, its name or place; or only a name; and the width of its vectors."""

    encoder: AnyEncoder | None = None
    name: str | None = None
    dim: int | None = None

    def identity(self, width: int) -> EncoderIdentity | None:
        """The encoder it means, for vectors of this width; None when it says nothing."""
        if self.encoder is not None:
            return identity_of(loaded(self.encoder))
        return EncoderIdentity(name=self.name, fingerprint=NOT_AT_HAND, dim=self.dim or width) if self.name else None

    def agrees(self, one: EncoderIdentity, other: EncoderIdentity) -> bool:
        """Whether both mean the same encoder, where a name alone is held against the other's name and the one claimed."""
        if one.dim != other.dim:
            return False
        if NOT_AT_HAND not in (one.fingerprint, other.fingerprint):
            return one.fingerprint == other.fingerprint
        by_name_only = [each.name for each in (one, other) if each.fingerprint == NOT_AT_HAND]
        return one.name == other.name or (self.encoder is not None and self.name in by_name_only)


def import_files(
    files: VectorFiles, path: Path, claim: Claim, progress: Progress | None = None
) -> tuple[Store, ImportReport]:
    """The store in `path` with the vectors of the files in it, and what became of them.

    Raises: what `store_for` raises; StoreError when a file is damaged, or no vector can be used.
    """
    new = not (path / DATABASE).is_file()
    store = store_for(files, path, claim)
    with filling(store, new=new):
        report = import_vectors(store, files, progress=progress)
        if not report.added and not report.already_present and not report.resumed_at:
            first = f" (first: {report.skipped[0].source}: {report.skipped[0].reason})" if report.skipped else ""
            raise StoreError(
                f"none of {report.rows} vectors in {files.shards[0].path} could be used{first}: save others"
            )
        settle_rule(store)
    return store, report


def store_for(files: VectorFiles, path: Path, claim: Claim) -> Store:
    """The store to import into: a new one, or the one in `path` when its vectors are of the same encoder.

    One that knew its encoder by name only learns it here.

    Raises: UsageError when nobody says which encoder it was; FingerprintError when the files or the store say another;
        StoreError when the store cannot be changed.
    """
    identity = _identity(files, claim)
    require_utf8(path)
    there = (path / DATABASE).is_file()
    store = _existing(path, identity, claim) if there else new_store(path, identity)
    keep_place(store, claim.encoder)
    return store


def _identity(files: VectorFiles, claim: Claim) -> EncoderIdentity:
    """The encoder that caller and files name, who must agree with each other and with the vectors' width."""
    said = claim.identity(files.dim)
    if said is None and files.encoder is None:
        raise UsageError(
            f"expected the encoder that made the vectors ({files.dim}-d): give --encoder FOLDER, or --encoder-name NAME "
            "when it is not at hand"
        )
    where = str(files.shards[0].path)
    for one in (said, files.encoder):
        if one is not None and one.dim != files.dim:
            raise FingerprintError(
                f"expected vectors of {one.dim} numbers, as {one.name} makes them, got {files.dim} in {where}: name the "
                "encoder that made them"
            )
    if said is not None and files.encoder is not None:
        return _better(files.encoder, said, claim, where)
    found = said or files.encoder
    assert found is not None
    return found


def _better(one: EncoderIdentity, other: EncoderIdentity, claim: Claim, where: str) -> EncoderIdentity:
    """The better known of two descriptions of the same encoder. Raises: FingerprintError when they are of two."""
    if not claim.agrees(one, other):
        raise FingerprintError(
            f"{where} was made with {_shown(one)}, the vectors to import with {_shown(other)}: use another index, or name "
            f"that encoder (--encoder FOLDER --encoder-name {one.name!r} says that they are the same)"
        )
    return one if one.fingerprint else other


def _shown(one: EncoderIdentity) -> str:
    return f"{one.name} ({one.dim}-d, {one.fingerprint[:12] or 'known by name only'})"


def _existing(path: Path, identity: EncoderIdentity, claim: Claim) -> Store:
    store = Store.open(path)
    try:
        if store.read_only:
            raise StoreError(f"expected an index that can be changed, {path} is read-only: import into a new folder")
        known = _better(store.encoder, identity, claim, str(path))
        if known == store.encoder:
            return store
        store.set_setting("encoder", json.dumps(asdict(known)))
    except BaseException:
        store.close()
        raise
    store.close()
    return Store.open(path)
