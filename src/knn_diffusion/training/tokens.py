"""The training examples of a run: made from images, shared by its processes, or made before by `index build --tokens`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from knn_diffusion import images
from knn_diffusion.checkpoint import write_json
from knn_diffusion.config import read_mapping
from knn_diffusion.errors import UsageError
from knn_diffusion.image_index import FrozenIndex, ImageIndex
from knn_diffusion.models.encoders import JointEncoder
from knn_diffusion.models.tokenizer_protocol import Tokenizer
from knn_diffusion.tokens import Examples, TokenFolder, Tokenize, makers_of, units_of
from knn_diffusion.training.checkpoints import latest_checkpoint
from knn_diffusion.training.options import RunOptions
from knn_diffusion.training.processes import Processes

EXAMPLES = "examples.json"
"""What a run learns from: the paths that it was given, its units of tokens, digests of its images and of its index."""


def examples_of(
    sources: Sequence[str | Path],
    index: ImageIndex,
    tokenizer: Tokenizer,
    folder: Path | None,
    processes: Processes,
    told: RunOptions,
) -> Examples:
    """The images under `sources`, tokenized and embedded; without sources all that the folder holds.

    What is missing is made now, each process its share of the units, and kept in the folder, or without one in the run's
    cache: an interrupted call goes on there. All processes must call this. A run that has begun goes on with the units it was
    begun with, whatever came to the folder since. Images that cannot be used are listed in `skipped.json` of the run.

    Raises: UsageError when no image could be used, or a run has begun with others; FingerprintError when the folder was made with
        another tokenizer or encoder; StoreError when it is damaged.
    """
    given = [os.path.abspath(one) for one in sources]
    with processes.together():
        makers = makers_of(tokenizer, encoder=index.encoder.fingerprint, dim=index.encoder.dim)
        place = folder or told.output / "cache" / f"tokens-{makers.digest[:12]}"
        if not sources and not place.is_dir():
            raise UsageError(
                f"expected a folder of tokens, {place} does not exist: name one that index build made, or --images"
            )
        tokens, begun = TokenFolder(place, makers), _begun(told.output)
        same = begun if begun is not None and (begun["given"], begun["makers"]) == (given, makers.digest) else None
        units = units_of(images.find_files(sources)) if sources and same is None else []
        with _on(processes.device, index.encoder):
            own = units[processes.rank :: processes.size]
            index.tokenize(own, tokens, Tokenize(tokenizer), progress=told.report, notice=told.notice)
    with processes.together():
        if processes.first:
            tokens.set_aside(units)
    with processes.together():
        names = [unit.name for unit in units] if sources else tokens.units()
        if same is not None:
            names = same["units"]
        found = tokens.examples(names)
        _check(found, begun, tokens.path, told.output)
    problem = f"expected a folder of tokens that nobody adds to for a moment, {tokens.path} was added to: start again"
    processes.require_same(found.digest, problem)
    with processes.together():
        if processes.first:
            if begun is None:
                facts = {"images": len(found), "contents": found.contents_digest, "units": names}
                write_json(told.output / EXAMPLES, {"given": given, "makers": makers.digest, **facts})
            _tell_skipped(found, told)
    return found


def _begun(output: Path) -> dict[str, Any] | None:
    """What a run that has a checkpoint was begun with, None for a new one."""
    file = output / EXAMPLES
    return read_mapping(file) if file.is_file() and latest_checkpoint(output / "checkpoints") is not None else None


def _check(found: Examples, begun: dict[str, Any] | None, folder: Path, output: Path) -> None:
    if not len(found) and not found.skipped:
        raise UsageError(
            f"expected tokens in {folder}, found none: name folders with --images, or the folder that index build filled"
        )
    if not len(found):
        first = found.skipped[0]["reason"]
        raise UsageError(f"expected readable images, all {len(found.skipped)} failed (first: {first}): check the files")
    if begun is not None and begun["contents"] != found.contents_digest:
        raise UsageError(
            f"expected the {begun['images']:,} pictures that {output} was begun with, got {len(found):,}, not the same: resume "
            "with the --images and --tokens of before, or choose another --output"
        )


def frozen_for_all(index: ImageIndex, processes: Processes, told: RunOptions) -> FrozenIndex:
    """The index as it is now, the same in all processes; a run that has begun with another is told so.

    Raises: UsageError when it is changed at this very moment.
    """
    with processes.together():
        frozen = index.frozen()
    problem = f"expected an index that stays as it is for a moment, {index.folder} was changed: start again"
    processes.require_same(frozen.digest, problem)
    with processes.together():
        if processes.first:
            begun, facts = _begun(told.output), read_mapping(told.output / EXAMPLES)
            if begun is not None and begun["index"] != frozen.digest and told.notice is not None:
                told.notice("the index is not as it was when the run was begun: its neighbors are found anew")
            write_json(told.output / EXAMPLES, facts | {"index": frozen.digest})
    return frozen


@contextmanager
def _on(device: torch.device, encoder: JointEncoder) -> Iterator[None]:
    """Let an encoder that can be moved work on a device meanwhile."""
    move = getattr(encoder, "to", None) if device.type != "cpu" else None
    if move is not None:
        move(device)
    try:
        yield
    finally:
        if move is not None:
            move("cpu")


def _tell_skipped(found: Examples, told: RunOptions) -> None:
    skipped, file = sorted(found.skipped, key=lambda one: one["source"]), told.output / "skipped.json"
    if not skipped:
        file.unlink(missing_ok=True)
        return
    write_json(file, [dict(one) for one in skipped])
    if told.notice is not None:
        of, first = len(found) + len(skipped), skipped[0]["reason"]
        told.notice(" ".join(f"skipped {len(skipped):,} of {of:,} pictures (first: {first}); all in {file}".split()))
