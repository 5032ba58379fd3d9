"""What the sticker world can show, what it is called, and the fixed split: `data/sticker_vocabulary.json`.

`recipes/sticker_vocabulary.py` makes that file; nothing here depends on the art at hand.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

from knn_diffusion.errors import UsageError
from knn_diffusion.stickers.concepts import with_article

Split = Literal["train", "held-out", "all"]
FILE = "sticker_vocabulary.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Concept:
    """One thing a sticker can show, in any family.

    name: plain English, unique; char: its emoji; flat: a sign or bare shape, left out of quality figures;
    person: people and parts of them, never tinted;
    held_out: absent from the training of tokenizer and denoiser, and from the bundled index;
    unnamed: neither its name nor its own synonyms stand in a caption of the encoder's training;
    validation: its prompts serve to choose settings, not to report quality;
    icon: its drawing in most families; other_icons: the drawing where a family spells it otherwise, None where it has none;
    synonyms: other words for it, most particular first.
    """

    name: str
    char: str
    icon: str
    synonyms: tuple[str, ...] = ()
    other_icons: dict[str, str | None] = field(default_factory=dict, hash=False)
    flat: bool = False
    person: bool = False
    held_out: bool = False
    unnamed: bool = False
    validation: bool = False

    @property
    def phrase(self) -> str:
        """The name with its article, as in "an apple", "scissors", "bacon"."""
        return with_article(self.name)

    def icon_in(self, family: str) -> str | None:
        """Name of the family's drawing; None where the family is known to have none."""
        return self.other_icons.get(family, self.icon)


@functools.cache
def _text() -> str:
    return (resources.files("knn_diffusion") / "data" / FILE).read_text(encoding="utf-8")


@functools.cache
def _content() -> dict[str, Any]:
    return json.loads(_text())  # type: ignore[no-any-return]


@functools.cache
def vocabulary() -> tuple[Concept, ...]:
    """Every concept, by name."""
    return tuple(Concept(**entry | {"synonyms": tuple(entry.get("synonyms", ()))}) for entry in _content()["concepts"])


@functools.cache
def held_out_pairs() -> frozenset[tuple[str, str]]:
    """(tint, concept name) combinations that no training shows, though it shows each half."""
    return frozenset((tint, name) for tint, name in _content()["held_out_pairs"])


@functools.cache
def split_digest() -> str:
    """First 16 hexadecimal digits of the SHA-256 of the vocabulary file; every report prints it."""
    return hashlib.sha256(_text().encode("utf-8")).hexdigest()[:16]


@functools.cache
def _by_name() -> dict[str, Concept]:
    return {concept.name: concept for concept in vocabulary()}


def concept_named(name: str) -> Concept:
    """The concept with this name. Raises: UsageError when there is none."""
    try:
        return _by_name()[name]
    except KeyError:
        raise UsageError(f"expected the name of a sticker concept, got {name!r}: choose one of vocabulary()") from None
