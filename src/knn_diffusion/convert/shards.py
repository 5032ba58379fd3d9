"""Weights in several files, as the Hugging Face hub has large ones: an index of JSON says which file holds which tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from knn_diffusion.convert.legacy import read_tensors
from knn_diffusion.errors import CheckpointError

ENDINGS = (".safetensors", ".bin")


def shard_names(index: Path) -> list[str]:
    """The files that an index names, in order. Raises: CheckpointError when it is damaged or names anything but files beside it."""
    return sorted(set(_weight_map(index).values()))


def read_shards(index: Path) -> dict[str, Tensor]:
    """Every tensor of an index, each from the file it names; no code of a file is run.

    Raises: CheckpointError when the index is damaged, a file is missing or damaged, or the files hold other tensors.
    """
    places = _weight_map(index)
    if missing := [name for name in sorted(set(places.values())) if not (index.parent / name).is_file()]:
        raise CheckpointError(
            f"expected the files that {index} names, {len(missing)} are missing (first: {missing[0]}): download it again"
        )
    found: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        tensors = read_tensors(index.parent / file)
        if twice := [name for name in tensors if places.get(name, file) != file]:
            raise CheckpointError(
                f"expected {twice[0]} in {places[twice[0]]} alone, as {index} says, {file} holds it too: download it again"
            )
        if lacking := [name for name, place in places.items() if place == file and name not in tensors]:
            raise CheckpointError(
                f"expected {lacking[0]} in {file}, as {index} says, it is not there: download it again"
            )
        found |= {name: value for name, value in tensors.items() if name in places}
    return found


def _weight_map(index: Path) -> dict[str, str]:
    """The index: name of a tensor -> the file beside it."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_unique)["weight_map"]
        names = dict(places)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:100]
        raise CheckpointError(
            f"expected an index of weights in {index}, it cannot be read ({reason}): download it again"
        ) from None
    for file in names.values():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or not file.endswith(ENDINGS):
            raise CheckpointError(
                f"expected names of {' or '.join(ENDINGS)} files beside {index}, it names {str(file)[:80]!r}: use another copy"
            )
    if not names:
        raise CheckpointError(f"expected an index of weights in {index}, it names none: download it again")
    return names


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)[:80]!r} stands there twice")
    return found
