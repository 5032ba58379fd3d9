"""What a sticker shows, as plain data sampled from a seed: one thing or two of one family, tinted, bordered, turned."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from knn_diffusion.errors import UsageError
from knn_diffusion.stickers.art import Art
from knn_diffusion.stickers.tints import TINTS, Body, body_of
from knn_diffusion.stickers.vocabulary import Concept, concept_named, held_out_pairs

RELATIONS = ("left of", "right of", "above", "below", "in front of")
OWN_COLOUR = (*TINTS, "gray", "light", "gold", "silver", "bronze", "rainbow")
"""A concept whose name holds one of these words is never tinted: a teal "red heart" says two things."""
SHARES = {"tinted": 11, "paired": 7, "varied": 6}
LARGEST_TURN = 12
TRIES = 40


@dataclass(frozen=True, slots=True)
class Thing:
    """One object of a sticker, by the name of its concept."""

    concept: str
    tint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sticker:
    """One sticker: the same one always gives the same pixels.

    relation: how the first thing stands to the second; bordered: with a die-cut white border; turned: degrees
    counter-clockwise; seed: of sizes and distances.
    """

    family: str
    things: tuple[Thing, ...]
    relation: str | None = None
    bordered: bool = False
    turned: int = 0
    mirrored: bool = False
    seed: int = 0


@functools.lru_cache(maxsize=20_000)
def body_in(art: Art, concept: str, family: str) -> Body | None:
    """What of the family's drawing takes a tint."""
    return body_of(art.picture(concept_named(concept), family))


def can_be_tinted(concept: Concept) -> bool:
    """True unless the concept is a sign, a person, or its name speaks of a colour."""
    return not concept.flat and not concept.person and not set(concept.name.replace("-", " ").split()) & set(OWN_COLOUR)


def plain_stickers(art: Art, families: Sequence[str], concepts: Sequence[Concept]) -> list[Sticker]:
    """Each of the concepts once in each of the families that show it, as it is."""
    chosen = set(concepts)
    return [
        Sticker(family=family, things=(Thing(concept.name),))
        for family in families
        for concept in art.concepts_of(family)
        if concept in chosen
    ]


class Sampler:
    """Draws stickers at random from families and concepts; a held-out pair of tint and concept never appears."""

    def __init__(self, art: Art, families: Sequence[str], concepts: Sequence[Concept]) -> None:
        allowed = set(concepts)
        self.art = art
        self.shown = {family: [c for c in art.concepts_of(family) if c in allowed] for family in families}
        self.plain = plain_stickers(art, families, concepts)
        if not self.plain:
            raise UsageError("expected concepts that the art shows, got none: give more art or other concepts")

    def tint(self, rng: random.Random, concept: Concept, family: str) -> str | None:
        """A tint that the drawing bears, None where the first few at random do not suit."""
        if not can_be_tinted(concept):
            return None
        body = body_in(self.art, concept.name, family)
        for name in rng.sample(list(TINTS), 4):
            if (name, concept.name) not in held_out_pairs() and body is not None and body.bears(name):
                return name
        return None

    def tinted(self, rng: random.Random) -> Sticker:
        """One thing in a named colour."""
        for _ in range(TRIES):
            plain = rng.choice(self.plain)
            name = self.tint(rng, concept_named(plain.things[0].concept), plain.family)
            if name is not None:
                return self._varied(rng, plain.family, (Thing(plain.things[0].concept, name),), 0.15)
        return self.varied(rng)

    def paired(self, rng: random.Random) -> Sticker:
        """Two things of one family in a relation, each tinted now and then."""
        family = rng.choice(self.plain).family
        if len(self.shown[family]) < 2:
            return self.varied(rng)
        chosen = rng.sample(self.shown[family], 2)
        things = tuple(
            Thing(concept.name, self.tint(rng, concept, family) if rng.random() < 0.25 else None) for concept in chosen
        )
        return self._varied(rng, family, things, 0.1, relation=rng.choice(RELATIONS))

    def varied(self, rng: random.Random) -> Sticker:
        """One thing in its own colours, bordered, turned or mirrored."""
        plain = rng.choice(self.plain)
        turned = rng.choice([-1, 1]) * rng.randint(3, LARGEST_TURN)
        look = rng.choice(("bordered", "bordered", "turned", "mirrored", "all"))
        can_mirror = not concept_named(plain.things[0].concept).flat  # a sign has writing
        return Sticker(
            family=plain.family, things=plain.things, seed=rng.getrandbits(32),
            bordered=look == "bordered" or (look == "all" and rng.random() < 0.5),
            turned=turned if look in ("turned", "all") else 0,
            mirrored=can_mirror and (look == "mirrored" or (look == "all" and rng.random() < 0.5)),
        )  # fmt: skip

    def _varied(
        self, rng: random.Random, family: str, things: tuple[Thing, ...], share: float, relation: str | None = None
    ) -> Sticker:
        return Sticker(
            family=family, things=things, relation=relation, seed=rng.getrandbits(32),
            bordered=rng.random() < share,
            turned=rng.choice([-1, 1]) * rng.randint(3, LARGEST_TURN) if rng.random() < share / 2 else 0,
            mirrored=relation is None and rng.random() < share / 2,
        )  # fmt: skip

    def stickers(self, count: int, seed: int) -> Iterator[Sticker]:
        """Every plain sticker once, then tinted, paired and varied ones up to `count`."""
        yield from self.plain[:count]
        kinds = [kind for kind, parts in SHARES.items() for _ in range(parts)]
        for number in range(len(self.plain), count):
            rng = random.Random(f"sticker {seed} {number}")
            yield getattr(self, rng.choice(kinds))(rng)
