"""Stickers in words: captions, plainest first, with the facts that each claims and that each sticker holds.

A caption is true of a sticker if all that it claims is among the sticker's facts; a loss over many pairs knows by that
which captions are no counterexamples.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from knn_diffusion.stickers.compositions import Sticker, Thing
from knn_diffusion.stickers.concepts import with_article
from knn_diffusion.stickers.vocabulary import concept_named

SYNONYMS = 3
WORDINGS = {"left of": "to the left of", "right of": "to the right of"}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above", "in front of": "behind"}


@dataclass(frozen=True, slots=True)
class Caption:
    """A text and what it claims."""

    text: str
    claims: tuple[str, ...]


def _is(word: str) -> str:
    return f"shows:{word}"


def _tinted(tint: str, word: str) -> str:
    return f"tint:{tint}:{word}"


def _stands(first: str, relation: str, second: str) -> str:
    return f"relation:{first}:{relation}:{second}"


def facts(sticker: Sticker, colour_of: Callable[[Thing], str | None] = lambda thing: thing.tint) -> list[str]:
    """What is true of the sticker.

    Args: colour_of: the colour of a thing, also of one that is not tinted: a plain fire engine is a red fire engine.
    """
    names = [thing.concept for thing in sticker.things]
    found = [f"concept:{name}" for name in names]
    for thing in sticker.things:
        concept = concept_named(thing.concept)
        colour = colour_of(thing)
        for word in (concept.name, *concept.synonyms):
            found += [_is(word), *([_tinted(colour, word)] if colour else [])]
    if sticker.relation:
        found += [_stands(names[0], sticker.relation, names[1]), _stands(names[1], INVERSE[sticker.relation], names[0])]
    if sticker.bordered:
        found.append("bordered")
    return list(dict.fromkeys(found))


def _phrase(thing: Thing) -> str:
    return with_article(thing.concept, told_by=thing.tint or "")


def _claims(thing: Thing) -> tuple[str, ...]:
    return (_tinted(thing.tint, thing.concept),) if thing.tint else (_is(thing.concept),)


def captions(sticker: Sticker, rng: random.Random) -> list[Caption]:
    """Wordings that are all true of the sticker, plainest first; synonyms vary from sticker to sticker."""
    found = _of_two(sticker) if sticker.relation else _of_one(sticker.things[0], rng)
    if sticker.bordered:
        richest = spoken(sticker.things, sticker.relation)
        found.append(Caption(f"{richest} with a white border", (*_all_claims(sticker), "bordered")))
        if not sticker.relation:
            told_by = sticker.things[0].tint or ""
            name = with_article(f"{sticker.things[0].concept} sticker", told_by=told_by)
            found.append(Caption(f"{name} with a white border", (*_all_claims(sticker), "bordered")))
    return list({caption.text: caption for caption in reversed(found)}.values())[::-1]


def _of_one(thing: Thing, rng: random.Random) -> list[Caption]:
    concept = concept_named(thing.concept)
    if thing.tint:
        claims = _claims(thing)
        name = f"{thing.tint} {thing.concept}"
        plain = [Caption(name, claims), Caption(_phrase(thing), claims)]
        plain.append(Caption(with_article(f"{thing.concept} sticker", told_by=thing.tint), claims))
        plain.append(Caption(thing.concept, (_is(thing.concept),)))
    else:
        claims = (_is(concept.name),)
        plain = [Caption(concept.name, claims), Caption(concept.phrase, claims)]
        plain.append(Caption(with_article(f"{concept.name} sticker"), claims))
    words = rng.sample(concept.synonyms, min(SYNONYMS, len(concept.synonyms)))
    for word in words:
        if thing.tint:
            plain.append(Caption(f"{thing.tint} {word}", (_tinted(thing.tint, word),)))
        else:
            plain.append(Caption(word, (_is(word),)))
    return plain


def _all_claims(sticker: Sticker) -> tuple[str, ...]:
    claims = tuple(claim for thing in sticker.things for claim in _claims(thing))
    if sticker.relation:
        claims += (_stands(sticker.things[0].concept, sticker.relation, sticker.things[1].concept),)
    return claims


def spoken(things: tuple[Thing, ...], relation: str | None) -> str:
    """The full sentence: "a purple cat to the left of a dog"."""
    joined = f" {WORDINGS.get(relation, relation)} " if relation else ""
    return joined.join(_phrase(thing) for thing in things)


def _of_two(sticker: Sticker) -> list[Caption]:
    first, second = sticker.things
    assert sticker.relation is not None
    shown = (*_claims(first), *_claims(second))
    back = spoken((second, first), INVERSE[sticker.relation])
    return [
        Caption(f"{first.concept} and {second.concept}", (_is(first.concept), _is(second.concept))),
        Caption(f"{_phrase(first)} and {_phrase(second)}", shown),
        Caption(spoken(sticker.things, sticker.relation), _all_claims(sticker)),
        Caption(back, _all_claims(sticker)),
        Caption(f"sticker of {spoken(sticker.things, sticker.relation)}", _all_claims(sticker)),
    ]
