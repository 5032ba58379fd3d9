"""Random numbers from names instead of history: the same (seed, image) or (seed, step) draws the same, always.

Nothing in this package reads or moves torch's global random state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from the parts' SHA-256, so that neighboring seeds share nothing."""
    digest = hashlib.sha256("/".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_for(*parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator seeded by `derive_seed(*parts)`."""
    return torch.Generator(device).manual_seed(derive_seed(*parts))


class BatchGenerator(torch.Generator):
    """Draws for some rows of a batch what they get when the whole batch is drawn at once.

    So a batch may be cut over processes and micro-batches, and every example still sees the same noise. Only `rand` and
    `randn` of this module know of it.
    """

    batch_size: int
    rows: slice

    @classmethod
    def of(cls, *parts: int | str, batch_size: int, rows: slice, device: torch.device | str = "cpu") -> BatchGenerator:
        """A fresh one, seeded as `generator_for` does, for these rows of a batch of that size."""
        made = cls(device)
        made.manual_seed(derive_seed(*parts))
        made.batch_size, made.rows = batch_size, rows
        return made


def rand(rows: int, *shape: int, generator: torch.Generator, dtype: torch.dtype | None = None) -> Tensor:
    """Uniform numbers in [0, 1) for each row, drawn where the generator lives."""
    return _drawn(torch.rand, rows, shape, generator, dtype)


def randn(rows: int, *shape: int, generator: torch.Generator, dtype: torch.dtype | None = None) -> Tensor:
    """Normal numbers for each row, drawn where the generator lives."""
    return _drawn(torch.randn, rows, shape, generator, dtype)


def _drawn(
    draw: Callable[..., Tensor],
    rows: int,
    shape: tuple[int, ...],
    generator: torch.Generator,
    dtype: torch.dtype | None,
) -> Tensor:
    if not isinstance(generator, BatchGenerator):
        return draw(rows, *shape, generator=generator, device=generator.device, dtype=dtype)
    drawn = draw(generator.batch_size, *shape, generator=generator, device=generator.device, dtype=dtype)
    part = drawn[generator.rows]
    assert len(part) == rows, f"a generator for {len(part)} rows was asked for {rows}"
    return part
