"""Prompts with known content: those that choose settings share no concept with those that report quality."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from knn_diffusion.errors import UsageError
from knn_diffusion.stickers.compositions import RELATIONS, Thing, can_be_tinted
from knn_diffusion.stickers.tints import TINTS
from knn_diffusion.stickers.vocabulary import Concept, Split, concept_named, held_out_pairs, vocabulary
from knn_diffusion.stickers.wording import spoken

Shape = Literal["plain", "tinted", "paired"]
Purpose = Literal["evaluation", "validation"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text, and what a sticker must show to follow it."""

    text: str
    things: tuple[Thing, ...]
    relation: str | None = None


def prompts(
    shape: Shape, count: int, seed: int = 0, *, split: Split = "train", purpose: Purpose = "evaluation"
) -> list[Prompt]:
    """Different prompts in a seeded order, fewer than `count` when there are not as many.

    Args: shape: one thing, one thing in a named colour, or two in a relation; split: "held-out" asks for held-out
        concepts, or when tinted for held-out pairs of tint and concept; purpose: which concepts may appear.
    Raises: UsageError when there is none.
    """
    chosen = [
        concept for concept in vocabulary() if not concept.flat and concept.validation == (purpose == "validation")
    ]
    rng = random.Random(f"prompts {shape} {split} {purpose} {seed}")
    makers = {"plain": _plain, "tinted": _tinted, "paired": _paired}
    made = [made for made, _ in zip(makers[shape](rng, chosen, split), range(count), strict=False)]
    if not made:
        raise UsageError(
            f"expected {shape} prompts of the split {split!r} for {purpose}, there are none: ask for others"
        )
    return [Prompt(spoken(things, relation), things, relation) for things, relation in made]


Made = tuple[tuple[Thing, ...], str | None]


def _of_split(concepts: list[Concept], split: Split) -> list[Concept]:
    return [concept for concept in concepts if split == "all" or concept.held_out == (split == "held-out")]


def _plain(rng: random.Random, concepts: list[Concept], split: Split) -> Iterator[Made]:
    choices = _of_split(concepts, split)
    for concept in rng.sample(choices, len(choices)):
        yield (Thing(concept.name),), None


def _tinted(rng: random.Random, concepts: list[Concept], split: Split) -> Iterator[Made]:
    able = {concept.name for concept in concepts if can_be_tinted(concept)}
    held_out = sorted(pair for pair in held_out_pairs() if pair[1] in able)
    shown = [
        (tint, name)
        for name in sorted(able)
        if not concept_named(name).held_out
        for tint in TINTS
        if (tint, name) not in held_out_pairs()
    ]
    choices = {"train": shown, "held-out": held_out, "all": shown + held_out}[split]
    for tint, name in rng.sample(choices, len(choices)):
        yield (Thing(name, tint),), None


def _paired(rng: random.Random, concepts: list[Concept], split: Split) -> Iterator[Made]:
    choices = _of_split(concepts, split)
    order = rng.sample(choices, len(choices))
    for first, second in zip(order, order[1:] + order[:1], strict=True):
        if first is not second:
            yield (Thing(first.name), Thing(second.name)), rng.choice(RELATIONS)
