"""Training examples as they are read: records of many parts on the disk, like one array."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Int, Shaped, UInt8

from knn_diffusion.config import config
from knn_diffusion.errors import StoreError
from knn_diffusion.retrieval.stored_array import map_bytes

FORMAT_VERSION = 1
CONTENT_BYTES = 32
MAPPED = 16_384
"""Parts that are mapped at once; a process may have some 65,000 maps of all kinds."""
AGAIN = "and give the command that made it again"


@config
class Makers:
    """What tokens and embeddings depend on besides the images.

    tokenizer   digest of the tokenizer's weights and settings
    encoder     fingerprint of the joint encoder
    """

    tokenizer: str
    seq: int
    vocab_size: int
    encoder: str
    dim: int
    format_version: int = FORMAT_VERSION

    @property
    def digest(self) -> str:
        """Of all this together."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    @property
    def record(self) -> np.dtype:
        """How an image lies on the disk."""
        return np.dtype([("embedding", "<f2", (self.dim,)), ("tokens", token_type(self.vocab_size), (self.seq,))])


def token_type(vocab_size: int) -> type[np.integer]:
    """The smallest integers that hold these codes."""
    return np.uint16 if vocab_size <= 2**16 else np.int32


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Some images of a unit on the disk: how many, the sizes of both files in bytes, and their SHA-256."""

    images: int
    bytes: Mapping[str, int]
    sha256: Mapping[str, str]


@dataclass(eq=False, slots=True)
class Examples:
    """The records of many parts, one behind the other, read as an array is: `examples[rows]`."""

    makers: Makers
    parts: Sequence[tuple[Path, Part]]
    """Where each lies, but for the end of its name, and what it should be."""
    skipped: Sequence[Mapping[str, str]]
    """Source and reason of the images that could not be used."""
    _firsts: Int[np.ndarray, "parts_and_one"] = field(init=False)
    _mapped: dict[int, np.ndarray] = field(default_factory=dict)
    _sound: set[int] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._firsts = np.cumsum([0, *(part.images for _, part in self.parts)])

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, rows: Int[np.ndarray, "some"]) -> Shaped[np.ndarray, "some"]:
        """These records, copied. Raises: StoreError when a part is missing or damaged."""
        found = np.empty(len(rows), self.makers.record)
        owners = self._firsts.searchsorted(rows, side="right") - 1
        for owner in np.unique(owners).tolist():
            places = np.flatnonzero(owners == owner)
            found[places] = self._records(owner)[rows[places] - self._firsts[owner]]
        return found

    @property
    def contents(self) -> UInt8[np.ndarray, "images digest"]:
        """The SHA-256 of each image's pixels. Raises: StoreError when a part is missing or damaged."""
        whole = np.empty((len(self), CONTENT_BYTES), np.uint8)
        for (place, part), first in zip(self.parts, self._firsts.tolist(), strict=False):
            rows = _mapped(place, part, "contents", verify=True)[-CONTENT_BYTES * part.images :]
            whole[first : first + part.images] = rows.reshape(-1, CONTENT_BYTES)
        return whole

    @property
    def digest(self) -> str:
        """Changes whenever an image, its tokens or its embedding does."""
        return _digest(part.sha256[kind] for _, part in self.parts for kind in ("examples", "contents"))

    @property
    def contents_digest(self) -> str:
        """Changes whenever an image does, whoever tokenizes it."""
        return _digest(part.sha256["contents"] for _, part in self.parts)

    def _records(self, owner: int) -> np.ndarray:
        with self._lock:
            records = self._mapped.pop(owner, None)
            if records is None:
                place, part = self.parts[owner]
                content = _mapped(place, part, "examples", verify=owner not in self._sound)
                offset = len(content) - part.images * self.makers.record.itemsize
                records = np.frombuffer(content, self.makers.record, offset=offset)
                self._sound.add(owner)
                if len(self._mapped) >= MAPPED:
                    self._mapped.pop(next(iter(self._mapped)))
            self._mapped[owner] = records  # the last one that is let go
            return records


def _digest(parts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _mapped(place: Path, part: Part, kind: str, *, verify: bool) -> UInt8[np.ndarray, "bytes"]:
    """The mapped bytes of a file of a part."""
    path = Path(f"{place}.{kind}.npy")
    cure = f"delete units/{place.name.rpartition('-')[0]}.* {AGAIN}"
    try:
        content = map_bytes(path)
    except (OSError, RuntimeError) as error:
        raise StoreError(f"{path} cannot be read ({' '.join(str(error).split())}): {cure}") from None
    if len(content) != part.bytes[kind] or (verify and hashlib.sha256(content.data).hexdigest() != part.sha256[kind]):
        raise StoreError(f"{path} is damaged (it is not what was written): {cure}")
    return content
