"""The joint encoder of an index: who made its embeddings, where it is kept, and that no other one takes its place."""

from __future__ import annotations

import threading
from pathlib import Path

from knn_diffusion.errors import FingerprintError
from knn_diffusion.hub import is_hub_id
from knn_diffusion.image_index.shared import Place
from knn_diffusion.models.encoders import JointEncoder, load_encoder
from knn_diffusion.retrieval.store import EncoderIdentity, Store

AnyEncoder = JointEncoder | str | Path
"""A joint encoder, or the name or folder of one."""

NOT_AT_HAND = ""
"""The fingerprint of an encoder that is known by name only."""
PLACE = "encoder_place"
"""The setting that says by which name or in which folder the encoder was found."""


class IndexEncoder:
    """The encoder of a store: as given, else from the model folder around the store, else from where it was last."""

    def __init__(self, store: Store, given: AnyEncoder | None, place: Place | None = None) -> None:
        self._store, self._lock, self.place = store, threading.Lock(), place
        self._named = given if isinstance(given, str | Path) else None
        self._loaded = None if given is None or isinstance(given, str | Path) else checked(given, store)

    @property
    def given(self) -> AnyEncoder | None:
        """The encoder if it is loaded, else what was given; to open the same index with again."""
        return self._loaded or self._named

    def load(self) -> JointEncoder:
        """The encoder, loaded once.

        Raises: FingerprintError when the one of that name or place is another; UsageError when there is none.
        """
        with self._lock:
            if self._loaded is None:
                refuse_unknown(self._store)
                found = loaded(self._named) if self._named else load_encoder(self._remembered())
                self._loaded = checked(found, self._store)
            return self._loaded

    def _remembered(self) -> str | Path:
        """The encoder of the model folder that the index lies in, else where it was when the index was built."""
        if self.place is not None:
            self.place.fetch_encoder()
        if self._store.folder is not None and (beside := self._store.folder.parent / "encoder").is_dir():
            return beside
        return self._store.setting(PLACE) or self._store.encoder.name


def loaded(encoder: AnyEncoder) -> JointEncoder:
    """The encoder itself; who names `owner/name` of the hub asks to download it where it must be.

    Raises: UsageError when there is none of that name or in that folder; HubError when the hub has none.
    """
    return load_encoder(encoder, network=is_hub_id(encoder)) if isinstance(encoder, str | Path) else encoder


def identity_of(encoder: JointEncoder) -> EncoderIdentity:
    """What a store keeps of its encoder."""
    return EncoderIdentity(name=encoder.name, fingerprint=encoder.fingerprint, dim=encoder.dim)


def keep_place(store: Store, encoder: AnyEncoder | None) -> None:
    """Keep with the store where its encoder was found, if that is known."""
    if isinstance(encoder, str | Path):
        store.set_setting(PLACE, str(Path(encoder).absolute() if Path(encoder).is_dir() else encoder))


def checked(encoder: JointEncoder, store: Store) -> JointEncoder:
    """The encoder, if it is the one that made the store. Raises: FingerprintError when it is another."""
    refuse_unknown(store)
    made = store.encoder
    if (encoder.fingerprint, encoder.dim) != (made.fingerprint, made.dim):
        raise FingerprintError(
            f"{store.name} was built with {made.name} ({made.dim}-d, {made.fingerprint[:12]}), the encoder is "
            f"{encoder.name} ({encoder.dim}-d, {encoder.fingerprint[:12]}): load that encoder or build the index again"
        )
    return encoder


def refuse_unknown(store: Store) -> None:
    """Raise FingerprintError when the store's encoder is known by name only."""
    made = store.encoder
    if made.fingerprint == NOT_AT_HAND:
        raise FingerprintError(
            f"{store.name} was imported as made by {made.name} ({made.dim}-d), which is not at hand: search it by vectors, "
            f"or import the same files into it again with --encoder FOLDER --encoder-name {made.name!r}"
        )
