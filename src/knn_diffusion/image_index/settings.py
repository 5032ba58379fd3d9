"""What is kept with the images of an index: how they are framed and shown, when two count as the same, how far queries look."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from knn_diffusion.config import from_dict, parse_json, to_dict
from knn_diffusion.errors import ConfigError, StoreError
from knn_diffusion.images import FRAMING
from knn_diffusion.models.encoders import JointEncoder
from knn_diffusion.models.transformers_encoder import TransformersEncoder
from knn_diffusion.retrieval.dedup import DedupConfig, calibrate
from knn_diffusion.retrieval.plan import IndexConfig
from knn_diffusion.retrieval.store import EncoderIdentity, Store
from knn_diffusion.retrieval.stored_array import CURE

Kept = TypeVar("Kept", DedupConfig, IndexConfig)
RULE, REACH = "dedup", "reach"
FRAMED, PREVIEW_SIDE = "framing", "preview_side"
NEW_SIDE, EARLIER_SIDE, LARGEST_SIDE = 128, 64, 1024
"""Sides of previews in pixels: in new indexes, in those that keep no setting, and the largest that is believed."""


def new_store(path: Path | None, encoder: EncoderIdentity) -> Store:
    """A new store, in memory for no path, that knows how its pictures are framed and how large its previews are."""
    store = Store.create(path, encoder)
    store.set_setting(FRAMED, FRAMING)
    store.set_setting(PREVIEW_SIDE, str(NEW_SIDE))
    return store


def stored_framing(store: Store) -> str | None:
    """Name of the rule by which the pictures are framed, None in an index that was built before there was one."""
    return store.setting(FRAMED)


def preview_side(store: Store) -> int:
    """Side of the store's previews in pixels. Raises: StoreError when the setting is none."""
    stored = store.setting(PREVIEW_SIDE)
    if stored is None:
        return EARLIER_SIDE
    if not stored.isdecimal() or not 1 <= int(stored) <= LARGEST_SIDE:
        raise StoreError(
            f"{store.name}: expected previews of 1 to {LARGEST_SIDE} pixels, its setting says {stored[:20]!r}: restore a "
            "copy or build the index again"
        )
    return int(stored)


def stored_rule(store: Store) -> DedupConfig:
    """The rule kept with the store, else the paper's."""
    return _stored(store, RULE, DedupConfig)


def keep_rule(store: Store, rule: DedupConfig) -> None:
    """Keep a rule with the store."""
    store.set_setting(RULE, json.dumps(to_dict(rule)))


def settle_rule(store: Store, encoder: JointEncoder | None = None) -> None:
    """Keep a rule unless one is kept: the paper's for CLIP, else one calibrated on the pictures there are, else the paper's.

    The rule of a single image is left open. A name does not decide: people call CLIP "ViT-B/32", and their own "my-clips".
    """
    if store.setting(RULE) is None and len(store) > 1:
        is_clip = isinstance(encoder, TransformersEncoder) and not encoder.is_siglip
        keep_rule(store, (None if is_clip else calibrate(store)) or DedupConfig())


def stored_settings(store: Store) -> IndexConfig:
    """The settings of a search, with the reaches kept with the store."""
    return _stored(store, REACH, IndexConfig)


def keep_reach(store: Store, settings: IndexConfig) -> None:
    """Keep with the store how far queries look; all other settings are those of each opening."""
    store.set_setting(REACH, json.dumps({"image": to_dict(settings.image), "text": to_dict(settings.text)}))


def _stored(store: Store, name: str, config_class: type[Kept]) -> Kept:
    """What is kept by that name, else the defaults. Raises: StoreError when it is damaged."""
    if (stored := store.setting(name)) is None:
        return config_class()
    try:
        return from_dict(config_class, parse_json(stored), source=store.name)
    except (ValueError, ConfigError) as error:
        raise StoreError(f"{store.name} holds damaged settings ({name}: {error}): {CURE}") from None
