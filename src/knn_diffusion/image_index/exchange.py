"""Whose embeddings they are: the encoder of vectors that come from files, and the index they go into."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from knn_diffusion.errors import FingerprintError, StoreError, UsageError
from knn_diffusion.models.encoders import JointEncoder, load_encoder
from knn_diffusion.retrieval.database import DATABASE
from knn_diffusion.retrieval.interchange import VectorFiles
from knn_diffusion.retrieval.store import EncoderIdentity, Store

NOT_AT_HAND = ""
"""The fingerprint of an encoder that is known by name only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What the caller says of the encoder: itself, its name or place; or only a name; and the width of its vectors."""

    encoder: JointEncoder | str | Path | None = None
    name: str | None = None
    dim: int | None = None

    def identity(self, width: int) -> EncoderIdentity | None:
        """The encoder it means, for vectors of this width; None when it says nothing."""
        if self.encoder is not None:
            found = load_encoder(self.encoder) if isinstance(self.encoder, str | Path) else self.encoder
            return EncoderIdentity(name=found.name, fingerprint=found.fingerprint, dim=found.dim)
        return EncoderIdentity(name=self.name, fingerprint=NOT_AT_HAND, dim=self.dim or width) if self.name else None

    def agrees(self, one: EncoderIdentity, other: EncoderIdentity) -> bool:
        """Whether both mean the same encoder, where a name alone is held against the other's name and the one claimed."""
        if one.dim != other.dim:
            return False
        if NOT_AT_HAND not in (one.fingerprint, other.fingerprint):
            return one.fingerprint == other.fingerprint
        by_name_only = [each.name for each in (one, other) if each.fingerprint == NOT_AT_HAND]
        return one.name == other.name or (self.encoder is not None and self.name in by_name_only)


def store_for(files: VectorFiles, path: Path, claim: Claim) -> Store:
    """The store to import into: a new one, or the one in `path` when its vectors are of the same encoder.

    One that knew its encoder by name only learns it here.

    Raises: UsageError when nobody says which encoder it was; FingerprintError when the files or the store say another;
        StoreError when the store cannot be changed.
    """
    identity = _identity(files, claim)
    there = (path / DATABASE).is_file()
    store = _existing(path, identity, claim) if there else Store.create(path, identity)
    if isinstance(claim.encoder, str | Path):
        is_folder = Path(claim.encoder).is_dir()
        store.set_setting("encoder_place", str(Path(claim.encoder).absolute() if is_folder else claim.encoder))
    return store


def refuse_unknown(store: Store) -> None:
    """Raise FingerprintError when the store's encoder is known by name only."""
    made = store.encoder
    if made.fingerprint == NOT_AT_HAND:
        raise FingerprintError(
            f"{store.name} was imported as made by {made.name} ({made.dim}-d), which is not at hand: search it by vectors, "
            f"or import the same files into it again with --encoder FOLDER --encoder-name {made.name!r}"
        )


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
