"""The training examples of a run: made from images, shared by its processes, or made before by `index build --tokens`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from knn_diffusion import images
from knn_diffusion.checkpoint import write_json
from knn_diffusion.errors import UsageError
from knn_diffusion.image_index import ImageIndex
from knn_diffusion.models.encoders import JointEncoder
from knn_diffusion.models.tokenizer_protocol import Tokenizer
from knn_diffusion.tokens import Examples, TokenFolder, Tokenize, makers_of, units_of
from knn_diffusion.training.options import RunOptions
from knn_diffusion.training.processes import Processes


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
    cache: an interrupted call goes on there. All processes must call this. Images that cannot be used are listed in
    `skipped.json` of the run.

    Raises: UsageError when no image could be used; FingerprintError when the folder was made with another tokenizer or
        encoder; StoreError when it is damaged.
    """
    with processes.together():
        makers = makers_of(tokenizer, encoder=index.encoder.fingerprint, dim=index.encoder.dim)
        tokens = TokenFolder(folder or told.output / "cache" / f"tokens-{makers.digest[:12]}", makers)
        units = units_of(images.find_images(sources)) if sources else None
        if units is not None:
            own = units[processes.rank :: processes.size]
            with _on(processes.device, index.encoder):
                index.tokenize(own, tokens, Tokenize(tokenizer), told.report)
    with processes.together():
        found = tokens.examples(None if units is None else [unit.name for unit in units])
        if not len(found):
            raise UsageError(_nothing(found, tokens.path))
        if processes.first:
            _tell_skipped(found, told)
    digests = processes.texts(found.digest)
    with processes.together():
        if len(set(digests)) > 1:
            raise UsageError(
                f"expected a folder of tokens that nobody adds to, {tokens.path} was added to: start again"
            )
    return found


def _nothing(found: Examples, folder: Path) -> str:
    if not found.skipped:
        return f"expected tokens in {folder}, found none: name folders with --images, or the folder that index build filled"
    first = found.skipped[0]["reason"]
    return f"expected readable images, all {len(found.skipped)} failed (first: {first}): check the files"


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
    skipped, file = found.skipped, told.output / "skipped.json"
    if not skipped:
        file.unlink(missing_ok=True)
        return
    write_json(file, [dict(one) for one in skipped])
    if told.notice is not None:
        of, first = len(found) + len(skipped), skipped[0]["reason"]
        told.notice(" ".join(f"skipped {len(skipped):,} of {of:,} pictures (first: {first}); all in {file}".split()))
