"""Folders of stickers with captions: what tokenizer, denoiser, joint encoder and index learn from or show.

A folder holds `0000000.png` … (RGBA, framed), `captions.jsonl` with one object a line and, last of all, `dataset.json`.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from knn_diffusion.errors import KnnDiffusionError
from knn_diffusion.progress import Progress
from knn_diffusion.stickers.art import Art
from knn_diffusion.stickers.composing import compose
from knn_diffusion.stickers.compositions import Sampler, Sticker, Thing, body_in, plain_stickers
from knn_diffusion.stickers.families import BUNDLED, HELD_OUT_FAMILY, TRAINED
from knn_diffusion.stickers.filling import chunks, finish_folder, open_folder, spread, write_text
from knn_diffusion.stickers.vocabulary import concept_named, held_out_pairs, split_digest, vocabulary
from knn_diffusion.stickers.wording import captions, facts

Kind = Literal["train", "encoder", "neighbors", "index", "held-out", "held-out-family"]
"""What a folder is for.

train: tokenizer and denoiser, without held-out concepts; encoder: the joint encoder, with them, without unnamed ones;
neighbors: plain stickers of all trained families, from which the denoiser's neighbors come in training, as they do from a user's index;
index: plain stickers of the bundled families; both are named by what they show; held-out: plain stickers of held-out concepts;
held-out-family: plain stickers of the family that nothing is trained on.
"""
COUNTS: dict[Kind, int | None] = {
    "train": 34_000, "encoder": 40_000, "neighbors": None, "index": None, "held-out": None, "held-out-family": None,
}  # fmt: skip


def stickers_of(kind: Kind, art: Art, count: int | None = None, seed: int = 0) -> list[Sticker]:
    """The stickers of a folder. Args: count: how many at most, by default as many as the kind has."""
    every = vocabulary()
    trained = tuple(concept for concept in every if not concept.held_out)
    if kind == "train":
        return list(Sampler(art, TRAINED, trained).stickers(count or COUNTS[kind] or 0, seed))
    if kind == "encoder":
        named = tuple(concept for concept in every if not concept.unnamed)
        return list(Sampler(art, TRAINED, named).stickers(count or COUNTS[kind] or 0, seed))
    if kind in ("neighbors", "index"):
        found = plain_stickers(art, TRAINED if kind == "neighbors" else BUNDLED, trained)
    elif kind == "held-out":
        found = plain_stickers(art, TRAINED, tuple(concept for concept in every if concept.held_out))
    else:
        found = plain_stickers(art, (HELD_OUT_FAMILY,), every)
    return found[:count]


def file_name(kind: Kind, number: int, sticker: Sticker) -> str:
    """`0000123.png`, or of what is retrieved what it shows: `octopus (noto).png`."""
    if kind in ("neighbors", "index"):
        return f"{sticker.things[0].concept} ({sticker.family}).png".replace("/", "-")
    return f"{number:07d}.png"


def description(sticker: Sticker, file: str, art: Art) -> dict[str, Any]:
    """One line of `captions.jsonl`."""
    told = captions(sticker, random.Random(f"captions {file} {sticker.seed}"))
    concepts = [concept_named(thing.concept) for thing in sticker.things]

    def colour_of(thing: Thing) -> str | None:
        body = body_in(art, thing.concept, sticker.family)
        return thing.tint or (body.colour() if body is not None else None)

    return {
        "file": file, "captions": [caption.text for caption in told], "family": sticker.family,
        "concept": sticker.things[0].concept, "things": [asdict(thing) for thing in sticker.things],
        "relation": sticker.relation, "bordered": sticker.bordered, "turned": sticker.turned, "mirrored": sticker.mirrored,
        "held_out": any(concept.held_out for concept in concepts)
        or any((thing.tint, thing.concept) in held_out_pairs() for thing in sticker.things),
        "unnamed": any(concept.unnamed for concept in concepts),
        "facts": facts(sticker, colour_of), "caption_facts": [list(caption.claims) for caption in told],
    }  # fmt: skip


def _write_chunk(jobs: Sequence[tuple[str, Sticker]], folder: Path, size: int, art: Art) -> list[str]:
    """Compose what is not there yet, each file whole or not at all; the lines of captions.jsonl."""
    lines = []
    for file, sticker in jobs:
        path = folder / file
        if not path.exists():
            unfinished = path.with_suffix(".part")
            compose(sticker, size, art).save(unfinished, format="PNG")
            unfinished.replace(path)
        lines.append(json.dumps(description(sticker, file, art), ensure_ascii=False) + "\n")
    return lines


def make_stickers(
    folder: str | Path,
    kind: Kind,
    art: Art,
    *,
    count: int | None = None,
    seed: int = 0,
    size: int = 128,
    processes: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Write the stickers of a kind into `folder`.

    A run that was cut short goes on where it stopped when it is called again alike; a finished one is left as it is.
    Raises: UsageError when the folder holds anything else; KnnDiffusionError when it cannot be written.
    """
    facts_of_it = {
        "format_version": 2, "kind": kind, "count": count or COUNTS[kind], "seed": seed, "size": size,
        "split_digest": split_digest(), "art_sha256": art.digest,
    }  # fmt: skip
    place = Path(folder)
    try:
        if not open_folder(place, facts_of_it):
            _fill(place, kind, facts_of_it, art, processes, progress)
    except OSError as error:
        raise KnnDiffusionError(
            f"cannot write the data set into {place} ({error.strerror or error}): free space or choose another folder, "
            "then run the same command again to go on"
        ) from None
    return place


def _fill(place: Path, kind: Kind, told: dict[str, Any], art: Art, processes: int, progress: Progress | None) -> None:
    chosen = stickers_of(kind, art, told["count"], told["seed"])
    jobs = [(file_name(kind, number, sticker), sticker) for number, sticker in enumerate(chosen)]
    work: Callable[[Sequence[tuple[str, Sticker]]], list[str]] = functools.partial(
        _write_chunk, folder=place, size=told["size"], art=art
    )
    lines: list[str] = []
    for written in spread(work, chunks(jobs), processes):
        lines += written
        if progress is not None:
            progress("composing stickers", len(lines), len(jobs))
    write_text(place / "captions.jsonl", "".join(lines))
    finish_folder(place, told)
