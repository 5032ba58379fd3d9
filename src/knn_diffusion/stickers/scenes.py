"""What a sticker picture shows, as plain data: sampled from a seed, told in words."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from knn_diffusion.errors import UsageError
from knn_diffusion.stickers.concepts import Concept, Split, concepts, held_out_pairs, of_split, with_article
from knn_diffusion.stickers.glyphs import GlyphSource

COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "white", "grey", "black")
TINTS = tuple(colour for colour in COLOURS if colour not in ("white", "black"))
BACKGROUNDS = ("plain", "gradient", "spotlight", "dotted", "striped", "checked", "speckled")
RELATIONS = ("left of", "right of", "above", "below", "in front of")
OWN_COLOUR = (*COLOURS, "brown", "light", "gold", "silver", "bronze")
"""A concept whose name opens with one of these is never tinted: a teal "red heart" says two things."""

TURNS = (0,) * 14 + (180, -20, 20)

SEED_STRIDE = 1_000_000_007
PAIR_SHARE = 0.3
TINT_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class Thing:
    """One object of a scene; `turned` is in degrees counter-clockwise, 180 is upside down."""

    char: str
    name: str
    tint: str | None = None
    flipped: bool = False
    outlined: bool = False
    turned: int = 0


@dataclass(frozen=True, slots=True)
class Scene:
    """One sticker picture: the same scene always gives the same pixels; `seed` fixes placement, size and shade."""

    seed: int
    background: str
    background_colour: str
    things: tuple[Thing, ...]
    relation: str | None = None


def _sample_tint(rng: random.Random, name: str, background_colour: str, split: Split) -> str | None:
    if rng.random() >= TINT_SHARE or name.split(maxsplit=1)[0] in OWN_COLOUR:
        return None
    tints = [tint for tint in TINTS if tint != background_colour]
    if split == "train":
        tints = [tint for tint in tints if (tint, name) not in held_out_pairs()]
    return rng.choice(tints)


def _sample_thing(rng: random.Random, concept: Concept, background_colour: str, split: Split) -> Thing:
    return Thing(
        char=concept.char,
        name=concept.name,
        tint=_sample_tint(rng, concept.name, background_colour, split),
        flipped=rng.random() < 0.5,
        outlined=rng.random() < 0.5,
        turned=rng.choice(TURNS),
    )


def sample_scene(seed: int, among: Sequence[Concept] | None = None, split: Split = "train") -> Scene:
    """A random scene of one or two things.

    Args: among: the concepts to draw from, by default all; split: "train" never shows a held-out concept or a held-out
        pair of tint and concept, "held-out" shows held-out concepts only.
    Raises: UsageError when no concept is left.
    """
    return _sample(seed, _choices(among, split), split)


def sample_scenes(count: int, seed: int, split: Split = "train", glyphs: GlyphSource | None = None) -> list[Scene]:
    """The scenes of the data set `seed`: those `make_dataset` draws; data sets of different seeds share no scene.

    Args: glyphs: where they will be drawn from; a folder of glyphs limits the concepts to its own.
    """
    choices = _choices(concepts(glyphs), split)
    return [_sample(seed * SEED_STRIDE + number, choices, split) for number in range(count)]


def _choices(among: Sequence[Concept] | None, split: Split) -> tuple[Concept, ...]:
    choices = of_split(concepts() if among is None else among, split)
    if not choices:
        raise UsageError(f"expected concepts of the split {split!r}, got none: give more concepts or another split")
    return choices


def _sample(seed: int, choices: Sequence[Concept], split: Split) -> Scene:
    rng = random.Random(f"scene {seed}")
    background, colour = rng.choice(BACKGROUNDS), rng.choice(COLOURS)
    count = 2 if rng.random() < PAIR_SHARE and len(choices) > 1 else 1
    things = tuple(_sample_thing(rng, concept, colour, split) for concept in rng.sample(choices, count))
    return Scene(seed, background, colour, things, rng.choice(RELATIONS) if count == 2 else None)


def one_object_scene(
    concept: Concept,
    background_colour: str,
    seed: int,
    *,
    background: str = "plain",
    tint: str | None = None,
    outlined: bool = False,
    flipped: bool = False,
) -> Scene:
    """One upright thing on a given background, for an index or for evaluation.

    Raises: UsageError when a colour or the background is unknown.
    """
    for colour in (background_colour, *([tint] if tint else [])):
        if colour not in COLOURS:
            raise UsageError(
                f"expected a colour of the sticker world, got {colour!r}: choose one of {', '.join(COLOURS)}"
            )
    if background not in BACKGROUNDS:
        raise UsageError(f"expected a background, got {background!r}: choose one of {', '.join(BACKGROUNDS)}")
    thing = Thing(concept.char, concept.name, tint=tint, outlined=outlined, flipped=flipped)
    return Scene(seed, background, background_colour, (thing,))


def _described(thing: Thing, *, as_sticker: bool) -> str:
    told_by = " ".join(word for word in ("upside-down" if thing.turned == 180 else "", thing.tint or "") if word)
    return with_article(f"{thing.name} sticker" if as_sticker and thing.outlined else thing.name, told_by=told_by)


def caption(scene: Scene) -> str:
    """The full description: tint, name, sticker border, upside-down, relation, background and its colour."""
    told = f" {scene.relation} ".join(_described(thing, as_sticker=True) for thing in scene.things)
    return f"{told} on {with_article(f'{scene.background} {scene.background_colour} background')}"


def captions(scene: Scene, rng: random.Random, count: int = 1) -> list[str]:
    """Different wordings, each true of the scene and telling more or less of it, as the captions of found pictures do."""
    return [_one_wording(scene, rng) for _ in range(count)]


def _one_wording(scene: Scene, rng: random.Random) -> str:
    told = f" {scene.relation or 'and'} ".join(_described(thing, as_sticker=False) for thing in scene.things)
    joined = " and ".join(_described(thing, as_sticker=False) for thing in scene.things)
    bare = " and ".join(thing.name for thing in scene.things)
    colour = scene.background_colour
    backdrop = with_article(f"{colour} background")
    patterned = with_article(
        f"{scene.background} {colour} background" if rng.random() < 0.5 else f"{colour} {scene.background} background"
    )
    wordings = (
        bare, joined, told, caption(scene),
        f"{told} on {backdrop}", f"{told} on {patterned}", f"{told}, {colour} background", f"{bare}, {colour} background",
        f"{joined} on {colour}", f"a picture of {joined}", f"a picture of {told} on {backdrop}", f"an image of {joined}",
        f"a drawing of {told} on {patterned}", f"an emoji of {joined}", f"{bare} emoji", f"{bare} sticker",
        f"sticker of {told}", f"sticker of {told} on {backdrop}", f"a sticker showing {joined} on {patterned}",
        f"{joined} in front of {backdrop}", f"clip art of {bare}", f"{scene.background} {colour} background with {joined}",
    )  # fmt: skip
    return rng.choice(wordings)


def evaluation_prompts(
    seed: int, count: int, split: Split = "train", among: Sequence[Concept] | None = None
) -> list[tuple[str, Concept, str]]:
    """Prompts naming one object and a background colour, as (text, concept, background colour).

    Flat concepts are left out; no concept comes twice before every one has come once, and colours come evenly.
    Raises: UsageError when no concept is left.
    """
    solid = [concept for concept in (concepts() if among is None else among) if not concept.flat]
    choices = _choices(solid, split)
    rng = random.Random(f"prompts {seed}")
    prompts: list[tuple[str, Concept, str]] = []
    while len(prompts) < count:
        for concept in rng.sample(choices, len(choices)):
            colour = COLOURS[len(prompts) % len(COLOURS)]
            prompts.append((f"{concept.phrase} on {with_article(f'{colour} background')}", concept, colour))
    return prompts[:count]
