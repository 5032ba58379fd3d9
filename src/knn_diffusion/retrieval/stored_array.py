"""One array of a segment: a plain .npy file, mapped when it is first seen and verified a block at a time as it is read.

The digest of the file is signed with the store. Those of its blocks are a shortcut: rows whose block has the digest it
should have are sound without the rest of the file being read. Where one is missing or differs, the whole file decides.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int, Shaped, UInt8

from knn_diffusion.checkpoint import atomic_write_bytes, file_digest
from knn_diffusion.errors import StoreError

BLOCK_ROWS = 64
WORTH_BLOCKS = 4096
"""Arrays of up to so many rows are verified as a whole."""
DIGEST_BYTES = 32
CURE = "restore a copy or build the index again"

Array = Shaped[np.ndarray, "rows width"]


@dataclass(eq=False, kw_only=True, slots=True)
class StoredArray:
    """Rows of one kind, in a file or in memory.

    sha256   of the .npy file
    blocks   SHA-256 of the rows of each block, one behind the other; empty where they are not known
    path     None for an array that lives in memory
    """

    sha256: str
    shape: tuple[int, int]
    dtype: type[np.generic]
    blocks: bytes = b""
    path: Path | None = None
    _content: UInt8[np.ndarray, "bytes"] | None = None
    """The bytes of the file, not verified."""
    _rows: Array | None = None
    """The array over them, or in memory."""
    _sound: bytearray = field(default_factory=bytearray)
    """1 for each block that was verified."""

    @classmethod
    def of(cls, rows: Array) -> StoredArray:
        """An array in memory, with its digests."""
        worth = len(rows) > WORTH_BLOCKS
        parts = (rows[start : start + BLOCK_ROWS] for start in range(0, len(rows) if worth else 0, BLOCK_ROWS))
        return cls(
            sha256=hashlib.sha256(npy_bytes(rows)).hexdigest(),
            shape=(len(rows), rows.shape[1]),
            dtype=rows.dtype.type,
            blocks=b"".join(hashlib.sha256(part.data).digest() for part in parts),
            _rows=rows,
            _sound=bytearray(b"\1") * _num_blocks(len(rows)),
        )

    def row(self, number: int) -> Shaped[np.ndarray, "width"]:
        """One row, over the memory of the array. Raises: StoreError when the file is missing or damaged."""
        if not self._sound or not self._sound[number // BLOCK_ROWS]:
            self._verify([number // BLOCK_ROWS])
        return self._rows[number]  # type: ignore[index, no-any-return]

    def take(self, numbers: Int[np.ndarray, "some"]) -> Shaped[np.ndarray, "some width"]:
        """These rows, copied. Raises: as `row`."""
        if not self._sound or 0 in self._sound:
            blocks = np.unique(numbers // BLOCK_ROWS).tolist()
            self._verify([block for block in blocks if not self._sound or not self._sound[block]])
        assert self._rows is not None
        return self._rows.take(numbers, axis=0)

    def hold(self) -> bool:
        """Map the file, so that it can be read whoever deletes it; False when it is not there."""
        if self.path is None or self._content is not None:
            return True
        with suppress(OSError, RuntimeError):  # beyond what the system maps, it is tried again when it is read
            self._content = map_bytes(self.path)
        return self._content is not None or self.path.exists()

    def write(self, path: Path) -> None:
        """Put the array on the disk and forget it; it is mapped when next asked for."""
        assert self._rows is not None
        atomic_write_bytes(path, npy_bytes(self._rows))
        self.path, self._rows, self._sound = path, None, bytearray()

    def move(self, path: Path) -> None:
        """Give the file another name on the same disk. Raises: OSError."""
        assert self.path is not None
        os.replace(self.path, path)
        self.path = path

    def problems(self) -> Iterator[str]:
        """What is wrong with the file, in a few words."""
        if self.path is None:
            return
        if not self.path.is_file():
            yield f"{self.path.name} is missing"
        elif file_digest(self.path) != self.sha256:
            yield f"{self.path.name} is damaged (its digest is not the stored one)"

    def _verify(self, blocks: list[int]) -> None:
        """Make sure that these blocks are what was written: each by its own digest, or by that of the file."""
        if self._rows is None:
            self._open()
        assert self._rows is not None
        for block in blocks:
            rows = self._rows[block * BLOCK_ROWS : (block + 1) * BLOCK_ROWS]
            if hashlib.sha256(rows.data).digest() != self.blocks[block * DIGEST_BYTES : (block + 1) * DIGEST_BYTES]:
                self._verify_file()
                return
            self._sound[block] = 1

    def _verify_file(self) -> None:
        assert self._content is not None
        if hashlib.sha256(self._content.data).hexdigest() != self.sha256:
            self._rows, self._sound = None, bytearray()
            raise StoreError(f"{self.path} is damaged (its digest is not the stored one): {CURE}")
        self._sound[:] = b"\1" * len(self._sound)

    def _open(self) -> None:
        """Map the file, if it was not so far, and see the array in it."""
        assert self.path is not None
        try:
            content = self._content if self._content is not None else map_bytes(self.path)
        except (OSError, RuntimeError) as error:
            if not self.path.parent.is_dir():
                raise StoreError(
                    f"{self.path.parent} is not there any more: open the index again where it is now"
                ) from None
            raise StoreError(f"{self.path} cannot be read ({' '.join(str(error).split())}): {CURE}") from None
        head, size = _npy_head(self.shape, self.dtype), np.dtype(self.dtype).itemsize * self.shape[0] * self.shape[1]
        if content[: len(head)].tobytes() != head or len(content) != len(head) + size:
            raise StoreError(f"{self.path} is damaged (expected {self.shape} {self.dtype.__name__}): {CURE}")
        rows = np.frombuffer(content, self.dtype, offset=len(head)).reshape(self.shape)
        self._content, self._sound, self._rows = content, bytearray(_num_blocks(len(rows))), rows


def npy_bytes(array: np.ndarray) -> bytes:
    """The array as the bytes of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _num_blocks(rows: int) -> int:
    return -(-rows // BLOCK_ROWS)


def map_bytes(path: Path) -> UInt8[np.ndarray, "bytes"]:
    """The bytes of a file without reading them, and without a file kept open: an index may have very many."""
    size = path.stat().st_size
    content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8).numpy()
    content.flags.writeable = False
    return content


def _npy_head(shape: tuple[int, int], dtype: type[np.generic]) -> bytes:
    """What stands in a .npy file before the array."""
    buffer = io.BytesIO()
    facts = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, facts)
    return buffer.getvalue()
