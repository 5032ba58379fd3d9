"""A folder of training examples: tokens and embedding of each image, in parts that are made, kept and checked one by one.

    tokens.json                which tokenizer and which encoder made them
    parts/3f…a2.examples.npy   a record for each image: embedding float16 [dim], then tokens uint16 or int32 [seq]
    parts/3f…a2.contents.npy   uint8 [images, 32], the SHA-256 of each image's pixels, by which an index knows it
    parts/3f…a2.json           the digests of both, and the images that could not be used; written last

A part is there as a whole or not at all, and belongs to one unit of images (`units.py`). Any number of processes may make
parts of the same folder, each its own. Records are mapped, not loaded, and verified when a part is first read, so there may
be more of them than memory. Other tools can read them with `numpy.load`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Int, Integer, Shaped, UInt8

from knn_diffusion.checkpoint import TEMPORARY, atomic_write_bytes, write_json
from knn_diffusion.config import config, from_dict, read_mapping, to_dict
from knn_diffusion.errors import ConfigError, FingerprintError, StoreError, UsageError
from knn_diffusion.retrieval.stored_array import map_bytes, npy_bytes

FACTS, PARTS = "tokens.json", "parts"
FORMAT_VERSION = 1
CONTENT_BYTES = 32
CURE = "delete the part (its .json is enough) and give the command that made it again"


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
class Made:
    """What came of the images of a unit, in their order.

    skipped   source and reason of those that could not be used
    """

    contents: UInt8[np.ndarray, "images digest"]
    embeddings: Float16[np.ndarray, "images dim"]
    tokens: Integer[np.ndarray, "images seq"]
    skipped: Sequence[Mapping[str, str]]


class TokenFolder:
    """The parts of one tokenizer and one encoder."""

    def __init__(self, path: Path, makers: Makers) -> None:
        """Open a folder, or begin one.

        Raises: FingerprintError when others made what is there; UsageError when something else lies there.
        """
        self.path, self.makers = path, makers
        facts = path / FACTS
        if not facts.is_file() and not _is_new(path):
            raise UsageError(f"expected a folder of tokens or a new one, {path} is neither: choose another")
        if not facts.is_file():
            write_json(facts, to_dict(makers))
        try:
            found = from_dict(Makers, read_mapping(facts), str(facts))
        except ConfigError as error:
            raise UsageError(f"expected a folder of tokens in {path}, got {error}") from None
        for name, what in (("tokenizer", "tokenizer"), ("encoder", "encoder"), ("format_version", "format")):
            before, asked = getattr(found, name), getattr(makers, name)
            if before != asked:
                raise FingerprintError(
                    f"{path} was made with the {what} {str(before)[:12]}, got {str(asked)[:12]}: choose another folder, or "
                    f"go on with that {what}"
                )

    def __contains__(self, name: str) -> bool:
        """Whether the part of this name is there."""
        return self._facts(name).is_file()

    def write(self, name: str, made: Made) -> None:
        """Keep a part. Raises: KnnDiffusionError when the disk is full; then it is not there."""
        records = np.empty(len(made.contents), self.makers.record)
        if len(records):
            records["embedding"], records["tokens"] = made.embeddings, made.tokens
        digests = {}
        for kind, array in (("examples", records), ("contents", made.contents)):
            content = npy_bytes(array)
            atomic_write_bytes(self._file(name, kind), content)
            digests[kind] = hashlib.sha256(content).hexdigest()
        facts = {"images": len(records), "sha256": digests, "skipped": [dict(one) for one in made.skipped]}
        write_json(self._facts(name), facts)

    def contents(self, name: str) -> list[bytes]:
        """The digest of each image of a part. Raises: StoreError when it is damaged."""
        return [one.tobytes() for one in self.examples([name]).contents]

    def examples(self, names: Iterable[str] | None = None) -> Examples:
        """The images of these parts, or of all there are.

        Raises: StoreError when one is missing or damaged.
        """
        place = self.path / PARTS
        chosen = sorted(path.stem for path in place.glob("*.json")) if names is None else list(names)
        return Examples(self.makers, [self._described(name) for name in chosen])

    def _described(self, name: str) -> Part:
        try:
            facts = read_mapping(self._facts(name))
            digests = facts["sha256"]
            return Part(
                examples=self._file(name, "examples"),
                contents=self._file(name, "contents"),
                examples_sha256=digests["examples"],
                contents_sha256=digests["contents"],
                images=int(facts["images"]),
                skipped=facts["skipped"],
            )
        except (ConfigError, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{self._facts(name)} is missing or damaged ({error}): {CURE}") from None

    def _file(self, name: str, kind: str) -> Path:
        return self.path / PARTS / f"{name}.{kind}.npy"

    def _facts(self, name: str) -> Path:
        return self.path / PARTS / f"{name}.json"


def _is_new(path: Path) -> bool:
    """Whether nothing lies there yet, or what another process has begun this moment."""
    if not path.exists():
        return True
    return path.is_dir() and (all(one.name.startswith(TEMPORARY) for one in path.iterdir()) or (path / FACTS).is_file())


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Files of a part, and what they should be."""

    examples: Path
    contents: Path
    examples_sha256: str
    contents_sha256: str
    images: int
    skipped: Sequence[Mapping[str, str]]


@dataclass(eq=False, slots=True)
class Examples:
    """The records of many parts, one behind the other, read as an array is: `examples[rows]`."""

    makers: Makers
    parts: Sequence[Part]
    _firsts: Int[np.ndarray, "parts_and_one"] = field(init=False)
    _mapped: dict[int, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._firsts = np.cumsum([0, *(part.images for part in self.parts)])

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
        for part, first in zip(self.parts, self._firsts.tolist(), strict=False):
            if part.images:
                rows = _verified(part.contents, part.contents_sha256)[-CONTENT_BYTES * part.images :]
                whole[first : first + part.images] = rows.reshape(-1, CONTENT_BYTES)
        return whole

    @property
    def digest(self) -> str:
        """Changes whenever an image, its tokens or its embedding does."""
        parts = [f"{part.examples_sha256} {part.contents_sha256}" for part in self.parts if part.images]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def contents_digest(self) -> str:
        """Changes whenever an image does, whoever tokenizes it."""
        parts = [part.contents_sha256 for part in self.parts if part.images]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    @property
    def skipped(self) -> list[Mapping[str, str]]:
        """Source and reason of the images that could not be used."""
        return [one for part in self.parts for one in part.skipped]

    def _records(self, owner: int) -> np.ndarray:
        if owner not in self._mapped:
            part, record = self.parts[owner], self.makers.record
            content = _verified(part.examples, part.examples_sha256)
            offset = len(content) - part.images * record.itemsize
            self._mapped[owner] = np.frombuffer(content, record, offset=offset)
        return self._mapped[owner]


def _verified(path: Path, sha256: str) -> UInt8[np.ndarray, "bytes"]:
    """The mapped bytes of a file that is what was written."""
    try:
        content = map_bytes(path)
    except (OSError, RuntimeError) as error:
        raise StoreError(f"{path} cannot be read ({' '.join(str(error).split())}): {CURE}") from None
    if hashlib.sha256(content.data).hexdigest() != sha256:
        raise StoreError(f"{path} is damaged (its digest is not the stored one): {CURE}")
    return content
