"""One side of a comparison: a folder, shards or a table of pictures put through a network, or features kept in a file.

A feature file is `.npz` with an array `features` and the name of its extractor, as `save_features` writes it, or a bare array in
`.npy`.
"""

from __future__ import annotations

import io
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from knn_diffusion import images
from knn_diffusion.checkpoint import atomic_write_bytes
from knn_diffusion.errors import ImageError, UsageError
from knn_diffusion.evaluation.features import FeatureExtractor, FeatureRows
from knn_diffusion.progress import Progress

FEATURE_FILES = (".npz", ".npy")
PICTURES_AT_ONCE = 16
JPEG = "JPEG"
FORMATS = {"jpg": JPEG, "jpeg": JPEG, "jfif": JPEG, "apng": "PNG", "tif": "TIFF"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """Features of one set of pictures, and what was seen of the pictures; from a feature file nothing was seen."""

    name: str
    """Path as it was given."""
    features: FeatureRows
    extractor: str
    """Name and digest of the network, empty where the file does not say."""
    formats: Counter[str] = field(default_factory=Counter)
    """Pictures of each file format, by their names."""
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Pictures of each width and height."""
    skipped: tuple[str, ...] = ()
    """Why pictures could not be read."""


def is_feature_file(place: str | Path) -> bool:
    """Whether a path is that of a feature file, by its name."""
    return Path(place).suffix.lower() in FEATURE_FILES


def identity(extractor: FeatureExtractor) -> str:
    """Name and digest, as files and reports say which network made features."""
    return f"{extractor.name}, {extractor.digest}"


def read_features(place: str | Path) -> Side:
    """Read a feature file.

    Raises: UsageError when it is missing, damaged, or holds no table of numbers.
    """
    path = Path(place)
    if not path.is_file():
        raise UsageError(f"expected a feature file, {path} is missing: check the path")
    try:
        with path.open("rb") as stream:  # NumPy leaves a damaged file open
            loaded = np.load(stream, allow_pickle=False)
            kept = {"features": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"expected a feature file of NumPy, {path} cannot be read ({reason}): write it again with --output"
        ) from None
    if "features" not in kept:
        raise UsageError(
            f"expected an array 'features' in {path}, got {', '.join(kept) or 'nothing'}: save the features themselves, "
            "one row a picture, not their moments"
        )
    rows = kept["features"]
    if rows.ndim != 2 or rows.dtype.kind not in "fiu":
        raise UsageError(
            f"expected features as [pictures, width] numbers, {path} holds {rows.dtype} {list(rows.shape)}: "
            "save one row a picture"
        )
    return Side(name=str(place), features=rows.astype(np.float32), extractor=str(kept.get("extractor", "")))


def read_pictures(place: str | Path, extractor: FeatureExtractor, progress: Progress) -> Side:
    """Put every picture of a folder, shard or table through a network; transparent ones on the ground that shows them.

    Pictures that cannot be read are left out and listed.

    Raises: UsageError when there is nothing at that place or no picture of it can be read.
    """
    found = images.find_images([place])
    rows: list[FeatureRows] = []
    formats, sizes, skipped = Counter[str](), Counter[tuple[int, int]](), list[str]()
    for start in range(0, len(found), PICTURES_AT_ONCE):
        batch = []
        for one in found[start : start + PICTURES_AT_ONCE]:
            try:
                picture = one.load()
            except ImageError as error:
                skipped.append(str(error))
                continue
            batch.append(images.on_ground(picture))
            sizes[picture.size] += 1
            if suffix := Path(one.key).suffix.lower().lstrip("."):
                formats[FORMATS.get(suffix, suffix.upper())] += 1
        if batch:
            rows.append(extractor.features(batch))
        progress(f"looking at {place}", min(start + PICTURES_AT_ONCE, len(found)), len(found))
    if not rows:
        raise UsageError(f"expected pictures in {place}, none of {len(found)} can be read: {skipped[0]}")
    return Side(
        name=str(place),
        features=np.concatenate(rows),
        extractor=identity(extractor),
        formats=formats,
        sizes=sizes,
        skipped=tuple(skipped),
    )


def save_features(path: Path, side: Side) -> None:
    """Write a feature file, whole or not at all."""
    content = io.BytesIO()
    np.savez(content, features=side.features, extractor=np.array(side.extractor))
    atomic_write_bytes(path, content.getvalue())
