"""Many sticker pictures at once: as arrays for training, or as a folder of PNG files with captions for evaluation."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from knn_diffusion.errors import KnnDiffusionError, UsageError
from knn_diffusion.progress import Progress
from knn_diffusion.stickers.concepts import Split, split_digest
from knn_diffusion.stickers.drawing import draw
from knn_diffusion.stickers.filling import chunks, finish_folder, open_folder, spread, write_text
from knn_diffusion.stickers.glyphs import FolderGlyphs, FontGlyphs
from knn_diffusion.stickers.scenes import Scene, caption, sample_scenes

NamedGlyphs = FontGlyphs | FolderGlyphs
"""Sources that other processes can open again and that have a digest."""


def _draw_chunk(scenes: Sequence[Scene], size: int, glyphs: NamedGlyphs) -> UInt8[np.ndarray, "n height width 3"]:
    return np.stack([np.asarray(draw(scene, size, glyphs)) for scene in scenes])


def render_array(
    scenes: Sequence[Scene],
    size: int,
    glyphs: NamedGlyphs | None = None,
    processes: int = 1,
    progress: Progress | None = None,
) -> UInt8[np.ndarray, "n height width 3"]:
    """The pixels of the scenes, by default with the glyphs of the installed font.

    Args: processes: more than one needs a main module that other processes can import (`if __name__ == "__main__"`).
    """
    source = FontGlyphs() if glyphs is None else glyphs
    pixels = np.empty((len(scenes), size, size, 3), np.uint8)
    done = 0
    for chunk in spread(functools.partial(_draw_chunk, size=size, glyphs=source), chunks(scenes), processes):
        pixels[done : done + len(chunk)] = chunk
        done += len(chunk)
        if progress is not None:
            progress("drawing stickers", done, len(scenes))
    return pixels


def _write_chunk(jobs: Sequence[tuple[int, Scene]], folder: Path, size: int, glyphs: NamedGlyphs) -> int:
    """Draw what is not there yet; each file appears whole or not at all."""
    for number, scene in jobs:
        path = folder / f"{number:07d}.png"
        if not path.exists():
            unfinished = path.with_suffix(".part")
            draw(scene, size, glyphs).save(unfinished, format="PNG")
            unfinished.replace(path)
    return len(jobs)


def make_dataset(
    folder: str | Path,
    count: int,
    seed: int = 0,
    size: int = 64,
    *,
    split: Split = "train",
    processes: int = 1,
    glyphs: NamedGlyphs | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write `count` pictures 0000000.png … with captions.jsonl and, last of all, dataset.json, into `folder`.

    A run that was cut short goes on where it stopped when it is called again alike; a finished one is left as it is.
    Raises: UsageError when the folder holds anything else; KnnDiffusionError when it cannot be written.
    """
    source = FontGlyphs() if glyphs is None else glyphs
    facts = {
        "format_version": 1, "count": count, "seed": seed, "size": size, "split": split,
        "split_digest": split_digest(), "glyphs_sha256": source.digest,
    }  # fmt: skip
    if count < 1:
        raise UsageError(f"expected at least 1 picture, got {count}: give a larger count")
    place = Path(folder)
    try:
        if open_folder(place, facts):
            return place
        _fill_folder(place, facts, source, processes, progress)
    except OSError as error:
        raise KnnDiffusionError(
            f"cannot write the data set into {place} ({error.strerror or error}): free space or choose another folder, "
            "then run the same command again to go on"
        ) from None
    return place


def _fill_folder(
    place: Path, facts: dict[str, Any], source: NamedGlyphs, processes: int, progress: Progress | None
) -> None:
    scenes = sample_scenes(facts["count"], facts["seed"], facts["split"], source)
    work = functools.partial(_write_chunk, folder=place, size=facts["size"], glyphs=source)
    done = 0
    for written in spread(work, chunks(list(enumerate(scenes))), processes):
        done += written
        if progress is not None:
            progress("drawing stickers", done, len(scenes))
    lines = (
        json.dumps({"file": f"{number:07d}.png", "caption": caption(scene), **asdict(scene)}, ensure_ascii=False) + "\n"
        for number, scene in enumerate(scenes)
    )
    write_text(place / "captions.jsonl", "".join(lines))
    finish_folder(place, facts)
