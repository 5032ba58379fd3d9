"""The art at hand: a folder `ART/FAMILY/ICON.png` of transparent pictures, as `render_art` fills it."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from knn_diffusion.errors import UsageError
from knn_diffusion.stickers.families import FAMILIES
from knn_diffusion.stickers.vocabulary import Concept, vocabulary


@dataclass(frozen=True, slots=True)
class Art:
    """Sticker art by family and concept."""

    folder: Path

    def path(self, concept: Concept, family: str) -> Path | None:
        """Where the family's drawing of the concept lies; None where there is none."""
        icon = concept.icon_in(family)
        place = self.folder / family / f"{icon}.png"
        return place if icon is not None and place.is_file() else None

    def picture(self, concept: Concept, family: str) -> Image.Image:
        """The family's drawing of the concept, RGBA. Raises: UsageError when there is none."""
        place = self.path(concept, family)
        if place is None:
            raise UsageError(f"expected {family} art of {concept.name!r} in {self.folder}: run recipes/fetch_art.py")
        with Image.open(place, formats=("PNG",)) as image:  # noqa: TID251
            return image.convert("RGBA")

    def concepts_of(self, family: str) -> tuple[Concept, ...]:
        """The concepts that the family shows, in the order of the vocabulary."""
        return _shown(self, family)

    @property
    def digest(self) -> str:
        """SHA-256 over names and sizes of the art that the vocabulary uses."""
        return _digest(self)


@functools.cache
def _shown(art: Art, family: str) -> tuple[Concept, ...]:
    return tuple(concept for concept in vocabulary() if art.path(concept, family) is not None)


@functools.cache
def _digest(art: Art) -> str:
    told = hashlib.sha256()
    for family in FAMILIES:
        for concept in art.concepts_of(family.name):
            place = art.path(concept, family.name)
            assert place is not None
            told.update(f"{family.name}/{place.name} {place.stat().st_size}\n".encode())
    return told.hexdigest()


def open_art(folder: str | Path) -> Art:
    """The art in a folder. Raises: UsageError when it holds none."""
    art = Art(Path(folder).absolute())
    if not any(art.concepts_of(family.name) for family in FAMILIES):
        raise UsageError(f"expected sticker art as FAMILY/ICON.png in {folder}, found none: run recipes/fetch_art.py")
    return art
