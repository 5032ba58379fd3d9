"""The concepts of the sticker world and the fixed split that holds some of them out.

List and split lie in `data/stickers_split.json`, so that neither depends on the font at hand; `split.py` makes that file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal

from knn_diffusion.errors import UsageError
from knn_diffusion.stickers.glyphs import FolderGlyphs, GlyphSource

Split = Literal["train", "held-out", "all"]

_PLURAL_LOOKING = {
    "abacus", "bus", "cactus", "christmas", "claus", "compass", "hibiscus", "hippopotamus", "lotus", "minibus", "octopus",
    "rhinoceros", "trolleybus", "tyrannosaurus", "virus",
}  # fmt: skip
_UNCOUNTED = {
    "bacon", "baguette bread", "bread", "broccoli", "bubble tea", "butter", "candy", "canned food", "cooked rice", "coral",
    "curry rice", "custard", "dna", "falafel", "flatbread", "fog", "fondue", "food on a skewer", "fried shrimp", "garlic",
    "ginger root", "green salad", "leafy green", "luggage", "meat on bone", "money with wings", "mount fuji", "nail polish",
    "popcorn", "roasted sweet potato", "sake", "salt", "shaved ice", "soap", "spaghetti", "stew", "stuffed flatbread", "sushi",
    "thread", "yarn",
}  # fmt: skip
_HEAD_ENDS = re.compile(r" (?:with|in|of|on|at|over|behind|and|from|without|hugging|wrestling|\w+ing|held|seen)\b")
_A_DESPITE_VOWEL = ("uni", "euro", "one-")
_AN_DESPITE_CONSONANT = ("hour", "x-ray")


@dataclass(frozen=True, slots=True)
class Concept:
    """One thing the sticker world can show.

    char: the emoji; name: its plain English name, unique; flat: a sign, button or bare shape, left out of quality
    figures; held_out: absent from the generator's training and from its index.
    """

    char: str
    name: str
    flat: bool
    held_out: bool

    @property
    def phrase(self) -> str:
        """The name with its article, as in "an apple", "scissors", "bacon"."""
        return with_article(self.name)


def with_article(noun: str, *, told_by: str = "") -> str:
    """The noun phrase with "a" or "an" before it, or nothing before plurals and things that are not counted.

    Args: told_by: words that come before the noun, such as a colour, and do not change whether it can be counted.
    """
    phrase = f"{told_by} {noun}" if told_by else noun
    last = _HEAD_ENDS.split(noun)[0].split()[-1]
    plural = last == "people" or (last.endswith("s") and not last.endswith("ss") and last not in _PLURAL_LOOKING)
    if noun in _UNCOUNTED or plural:
        return phrase
    vowel = phrase[0].lower() in "aeiou" and not phrase.startswith(_A_DESPITE_VOWEL)
    return ("an " if vowel or phrase.startswith(_AN_DESPITE_CONSONANT) else "a ") + phrase


def _read_data(name: str) -> Any:
    return json.loads((resources.files("knn_diffusion") / "data" / name).read_text(encoding="utf-8"))


@functools.cache
def _all_concepts() -> tuple[Concept, ...]:
    return tuple(Concept(**entry) for entry in _read_data("stickers_split.json")["concepts"])


def concepts(source: GlyphSource | None = None) -> tuple[Concept, ...]:
    """Every concept, in the fixed order of the split file; with a folder of glyphs only those the folder can draw."""
    every = _all_concepts()
    if isinstance(source, FolderGlyphs):
        drawable = source.characters
        every = tuple(concept for concept in every if concept.char in drawable)
    return every


def of_split(chosen: Iterable[Concept], split: Split) -> tuple[Concept, ...]:
    """Those of the concepts that belong to the split."""
    return tuple(concept for concept in chosen if split == "all" or concept.held_out == (split == "held-out"))


@functools.cache
def held_out_pairs() -> frozenset[tuple[str, str]]:
    """(tint, concept name) combinations that training never shows, though it shows each half."""
    return frozenset((tint, name) for tint, name in _read_data("stickers_split.json")["held_out_pairs"])


@functools.cache
def split_digest() -> str:
    """First 16 hexadecimal digits of the SHA-256 of the split file; every report prints it."""
    content = (resources.files("knn_diffusion") / "data" / "stickers_split.json").read_text(encoding="utf-8")
    return hashlib.sha256(content.encode("utf-8")).hexdigest()[:16]


@functools.cache
def everyday_words() -> dict[str, tuple[str, ...]]:
    """Everyday words that are no concept's name, each with the names of the concepts it may mean."""
    return {word: tuple(names) for word, names in _read_data("everyday_words.json").items()}


@functools.cache
def _by_name() -> dict[str, Concept]:
    return {concept.name: concept for concept in _all_concepts()}


def concept_named(name: str) -> Concept:
    """The concept with this name. Raises: UsageError when there is none."""
    try:
        return _by_name()[name]
    except KeyError:
        raise UsageError(f"expected the name of a sticker concept, got {name!r}: choose one of concepts()") from None
