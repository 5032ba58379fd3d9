"""What the objectives train on: pixels decoded once, tokens and neighbors computed once, all memory-mapped.

A dataset gives `batch(indices, generator)`; every random choice comes from the generator it is handed, so the same step
sees the same data after a resume and whatever the number of processes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from knn_diffusion import images
from knn_diffusion.checkpoint import atomic_path, atomic_write_bytes, file_digest, write_json
from knn_diffusion.config import read_mapping
from knn_diffusion.errors import ImageError, UsageError
from knn_diffusion.image_index import content_digest
from knn_diffusion.progress import Progress
from knn_diffusion.randomness import rand
from knn_diffusion.training.checkpoints import latest_checkpoint

Batch = Mapping[str, Tensor]
Notice = Callable[[str], None]
"""Called with a line that a person should read."""

PICTURES = "pictures.json"


@runtime_checkable
class Dataset(Protocol):
    """A fixed number of examples, drawn by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Int[Tensor, "batch"], generator: torch.Generator) -> Batch:
        """The examples at these indices as tensors; randomness only from the generator."""


@dataclass(frozen=True, slots=True)
class PixelDataset:
    """Square images for the tokenizer: `pixels` in [-1, 1], mirrored half of the time if asked."""

    array: UInt8[np.ndarray, "items height width channels"]
    mirror: bool = False

    def __len__(self) -> int:
        return len(self.array)

    def batch(self, indices: Int[Tensor, "batch"], generator: torch.Generator) -> Batch:
        """`pixels` of shape [batch, channels, height, width]."""
        pixels = images.pixels_from_uint8(self.array[indices.numpy()])
        if self.mirror:
            flipped = rand(len(indices), generator=generator) < 0.5
            pixels = torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)
        return {"pixels": pixels}


@dataclass(frozen=True, slots=True)
class PixelSet:
    """Decoded images, the content id of each, and a digest that names the whole set."""

    array: UInt8[np.ndarray, "items height width channels"]
    ids: list[str]
    digest: str


@dataclass(frozen=True, slots=True)
class Look:
    """Side and channels of decoded images."""

    size: int
    alpha: bool

    def __str__(self) -> str:
        """Part of the name of the folder they are kept in."""
        return f"{self.size}-rgba-{images.FRAMING.replace('/', '-')}" if self.alpha else str(self.size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image."""
        return self.size, self.size, 4 if self.alpha else 3

    def array(self, picture: Image.Image) -> UInt8[np.ndarray, "height width channels"]:
        """One image. Raises: ImageError when it is transparent everywhere."""
        return images.network_input(picture, self.size, alpha=self.alpha)


def load_pixels(
    sources: Sequence[str | Path],
    size: int,
    cache: Path,
    report: Progress | None = None,
    notice: Notice | None = None,
    *,
    alpha: bool = False,
) -> PixelSet:
    """Every readable image under `sources` as size × size pixels, decoded once and memory-mapped from `cache`.

    In RGB as `images.square` makes them; with `alpha` in RGBA, framed by `images.frame`, opaque ones with an alpha of 255.

    They are decoded again when a file has another size or time than before, or when the cache is incomplete. Images that
    cannot be read are left out and listed with their reasons in `skipped.json` beside the array; `notice` is told how many.

    Raises: UsageError when no image could be read.
    """
    found = images.find_images(sources)
    key = hashlib.sha256(
        "\n".join([str(size), *(f"{image.source}/{image.key}" for image in found)]).encode("utf-8", "backslashreplace")
    )
    look = Look(size, alpha)
    folder = cache / f"pixels-{look}-{key.hexdigest()[:12]}"
    stamps = hashlib.sha256("\n".join(_stamp(image.source) for image in found).encode()).hexdigest()
    if not _is_decoded(folder, stamps, look):
        _decode(found, look, folder, report, stamps)
    facts = read_mapping(folder / "done.json")
    if notice is not None:
        _tell_skipped(folder / "skipped.json", len(facts["ids"]), notice)
    array = np.memmap(folder / "pixels.u8", np.uint8, "r", shape=(len(facts["ids"]), *look.shape))
    return PixelSet(array, facts["ids"], facts["sha256"])


def keep_pictures(run: Path, digest: str, count: int) -> None:
    """Remember in a run's folder which pictures it learns from, and hold a run that has begun to them.

    Raises: UsageError when the run has a checkpoint and was begun with other pictures.
    """
    file = run / PICTURES
    if file.is_file() and latest_checkpoint(run / "checkpoints") is not None:
        before = read_mapping(file)
        if before.get("sha256") != digest:
            raise UsageError(
                f"expected the {before.get('count')} pictures that {run} was begun with, got {count}, not the same: resume "
                "with the --images of before, or choose another --output"
            )
        return
    write_json(file, {"count": count, "sha256": digest})


def _tell_skipped(file: Path, used: int, notice: Notice) -> None:
    skipped = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    if skipped:
        of = used + len(skipped)
        notice(
            " ".join(f"skipped {len(skipped)} of {of} pictures (first: {skipped[0]['reason']}); all in {file}".split())
        )


def _stamp(source: str) -> str:
    """Size and time of the file that an image lies in; a shard's or table's name stands before the last `::`."""
    place = source if os.path.exists(source) else source.rpartition("::")[0]
    try:
        status = os.stat(place)
    except OSError:
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


def _is_decoded(folder: Path, stamps: str, look: Look) -> bool:
    """Whether the cache holds the pixels of the files as they are now, whole."""
    done, pixels = folder / "done.json", folder / "pixels.u8"
    if not done.is_file() or not pixels.is_file():
        return False
    facts = read_mapping(done)
    return facts.get("stamps") == stamps and pixels.stat().st_size == len(facts["ids"]) * math.prod(look.shape)


def _decode(
    found: Sequence[images.SourceImage], look: Look, folder: Path, report: Progress | None, stamps: str
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "done.json").unlink(missing_ok=True)
    skipped: list[dict[str, str]] = []
    ids: list[str] = []
    with (folder / "pixels.u8").open("wb") as file:
        for number, image in enumerate(found):
            try:
                picture = image.load()
                pixels = look.array(picture).tobytes()
            except ImageError as error:
                skipped.append({"source": image.source, "key": image.key, "reason": str(error)})
            else:
                file.write(pixels)
                ids.append(content_digest(picture)[:16])
            if report is not None:
                report("decoding images", number + 1, len(found))
    if not ids:
        raise UsageError(
            f"expected readable images, all {len(found)} failed (first: {skipped[0]['reason']}): check the files"
        )
    write_json(folder / "skipped.json", skipped)
    write_json(folder / "done.json", {"ids": ids, "stamps": stamps, "sha256": file_digest(folder / "pixels.u8")})


def cached_array(cache: Path, name: str, facts: Mapping[str, object], compute: Callable[[], np.ndarray]) -> np.ndarray:
    """An array made once from these facts: memory-mapped from `cache` when it is there and sound, else computed and kept."""
    path = cache / f"{name}-{facts_key(facts)}.npy"
    digest = path.with_suffix(".sha256")
    if not (path.is_file() and digest.is_file() and digest.read_text(encoding="utf-8") == file_digest(path)):
        made = compute()
        digest.unlink(missing_ok=True)
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.save(file, made, allow_pickle=False)
        atomic_write_bytes(digest, file_digest(path).encode())
    return np.load(path, mmap_mode="r")


def facts_key(facts: Mapping[str, object]) -> str:
    """A short name for what something was made from."""
    return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:12]
