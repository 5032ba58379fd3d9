"""The used codes of a tokenizer: which they are, and a tokenizer of no others.

Many codes of a large codebook never win: VQ-Diffusion found 2,887 of GumbelVQ's 8,192 in use. A denoiser that need not tell
the rest apart learns faster. The codes that are kept get the numbers 0, 1, … in the order of the list; encoding chooses
among them alone.

Differs from VQ-Diffusion, which chooses among all codes and then makes each unused one code 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from knn_diffusion.checkpoint import atomic_path, save_weights
from knn_diffusion.convert.legacy import read_tensors
from knn_diffusion.errors import CheckpointError, UsageError

CODES_FILE = "codes.safetensors"
"""Beside a tokenizer's weights: `used`, the original number of each of its codes."""
ROWS = (
    "quantizer.codes",
    "quantizer.share",
    "quantize.embedding.weight",
    "quantize.embed.weight",
    "quantize.proj.weight",
    "quantize.proj.bias",
)
"""Tensors of tokenizers with one row for each code."""


def choose(counts: Int[Tensor, "vocab"], *, min_count: int = 1, share: float = 1.0) -> Int[Tensor, "used"]:
    """The fewest codes, the most used first, that make up `share` of all uses; none used less than `min_count` times.

    Returns: their numbers, ascending.
    Raises: UsageError when fewer than two codes are left.
    """
    order = counts.argsort(descending=True, stable=True)
    before = counts[order].cumsum(0) - counts[order]
    kept = order[(before < share * int(counts.sum())) & (counts[order] >= max(1, min_count))]
    if len(kept) < 2:
        raise UsageError(
            f"expected at least 2 codes to keep, got {len(kept)} of the {int((counts > 0).sum())} that were used: "
            "lower --min-count, raise --share or count more images"
        )
    return kept.sort().values


def write_used_codes(path: Path, used: Int[Tensor, "used"], counts: Int[Tensor, "vocab"] | None = None) -> None:
    """Write a list of used codes, with the counts it was chosen by."""
    with atomic_path(path) as temporary:
        save_weights(temporary, {"used": used} | ({} if counts is None else {"counts": counts}))


def read_used_codes(path: Path, vocab_size: int) -> Int[Tensor, "used"]:
    """The used codes of a tokenizer of `vocab_size` codes, in the order of their new numbers.

    Read are lists, as `write_used_codes` writes them, and VQ-Diffusion's files: the new number of each code, where several
    share a number the first is meant.

    Raises: CheckpointError when the file holds neither.
    """
    tensors = read_tensors(path)
    values = tensors.get("used", next(iter(tensors.values())) if len(tensors) == 1 else None)
    wrong = "no vector of whole numbers"
    if values is not None and values.ndim == 1 and not values.is_floating_point():
        labels = "used" not in tensors and len(values) == vocab_size
        used = _firsts(values.long()) if labels else values.long()
        low, high = (int(used.min()), int(used.max())) if len(used) else (0, 0)
        if len(used) >= 2 and low >= 0 and high < vocab_size and len(used.unique()) == len(used):
            return used.clone()
        wrong = f"{len(used)} codes from {low} to {high}, {len(used.unique())} of them different"
    raise CheckpointError(
        f"expected a list of used codes, or the new numbers 0, 1, … of {vocab_size} codes, {path} holds {wrong}: "
        "take the map that was made for this tokenizer"
    )


def _firsts(labels: Int[Tensor, "vocab"]) -> Int[Tensor, "used"]:
    """The first code of each label; nothing when labels are left out."""
    firsts: dict[int, int] = {}
    for code, label in enumerate(labels.tolist()):
        firsts.setdefault(label, code)
    whole = sorted(firsts) == list(range(len(firsts)))
    return torch.tensor([firsts[label] for label in sorted(firsts)] if whole else [], dtype=torch.int64)


def keep(config: Any, weights: Mapping[str, Tensor], used: Int[Tensor, "used"]) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and weights of the same tokenizer with the used codes alone."""
    kept = {name: value[used] if name in ROWS else value for name, value in weights.items()}
    return replace(config, vocab_size=len(used)), kept
