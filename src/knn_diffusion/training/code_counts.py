"""How often each code of a tokenizer is used on a set of images, so that a denoiser need learn only those that are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from knn_diffusion import images
from knn_diffusion.errors import ImageError, UsageError
from knn_diffusion.models.tokenizer_protocol import Tokenizer
from knn_diffusion.progress import Progress
from knn_diffusion.tokens import Tokenize
from knn_diffusion.training.data import Notice

AT_ONCE = 64
"""Images decoded before they are encoded together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeCounts:
    """What was counted.

    counts   uses of each code
    images   images that were read
    skipped  images that could not be
    """

    counts: Int[Tensor, "vocab"]
    images: int
    skipped: int


def count_codes(
    tokenizer: Tokenizer,
    sources: Sequence[str | Path],
    report: Progress | None = None,
    notice: Notice | None = None,
) -> CodeCounts:
    """Encode every readable image under `sources`, squared to the tokenizer's size, and count its codes.

    Args: notice: told in a line how many images were skipped.

    Raises: UsageError when no image could be read.
    """
    found, tokenize = images.find_images(sources), Tokenize(tokenizer)
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    reasons: list[str] = []
    for start in range(0, len(found), AT_ONCE):
        pictures = []
        for image in found[start : start + AT_ONCE]:
            try:
                pictures.append(images.square(image.load(), tokenize.size))
            except ImageError as error:
                reasons.append(str(error))
        counts += np.bincount(tokenize(pictures).reshape(-1), minlength=len(counts))
        if report is not None:
            report("counting codes", min(start + AT_ONCE, len(found)), len(found))
    if len(reasons) == len(found):
        raise UsageError(
            f"expected readable images, all {len(found)} failed (first: {', '.join(reasons[:1])}): check the files"
        )
    if reasons and notice is not None:
        notice(" ".join(f"skipped {len(reasons)} of {len(found)} pictures (first: {reasons[0]})".split()))
    return CodeCounts(counts=torch.from_numpy(counts), images=len(found) - len(reasons), skipped=len(reasons))
