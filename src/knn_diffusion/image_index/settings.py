"""How an index is searched, as it is kept with its images: when two count as the same, and how far queries look."""

from __future__ import annotations

import json

from knn_diffusion.config import from_dict, to_dict
from knn_diffusion.retrieval.dedup import DedupConfig, calibrate, default_rule
from knn_diffusion.retrieval.plan import IndexConfig
from knn_diffusion.retrieval.store import Store

RULE, REACH = "dedup", "reach"
BEFORE_CALIBRATION = DedupConfig(cosine=0.98)


def stored_rule(store: Store) -> DedupConfig:
    """The rule kept with the store, else the known one of its encoder, else a careful one."""
    stored = store.setting(RULE)
    if stored is None:
        return default_rule(store.encoder.name) or BEFORE_CALIBRATION
    return from_dict(DedupConfig, json.loads(stored), source=store.name)


def keep_rule(store: Store, rule: DedupConfig) -> None:
    """Keep a rule with the store."""
    store.set_setting(RULE, json.dumps(to_dict(rule)))


def settle_rule(store: Store) -> None:
    """Keep the known rule of the encoder, or one calibrated on the images there are, unless a rule is kept already."""
    if store.setting(RULE) is None:
        keep_rule(store, default_rule(store.encoder.name) or calibrate(store))


def stored_settings(store: Store) -> IndexConfig:
    """The settings of a search, with the reaches kept with the store."""
    stored = store.setting(REACH)
    return from_dict(IndexConfig, json.loads(stored), source=store.name) if stored else IndexConfig()


def keep_reach(store: Store, settings: IndexConfig) -> None:
    """Keep with the store how far queries look; all other settings are those of each opening."""
    store.set_setting(REACH, json.dumps({"image": to_dict(settings.image), "text": to_dict(settings.text)}))
