"""A folder of training examples: tokens and embedding of each image, in parts that are made, kept and checked one by one.

    tokens.json                     which tokenizer and which encoder made them
    parts/3f…a2-0000.examples.npy   a record for each image: embedding float16 [dim], then tokens uint16 or int32 [seq]
    parts/3f…a2-0000.contents.npy   uint8 [images, 32], the SHA-256 of each image's pixels, by which an index knows it
    units/3f…a2.json                of a shard, or some loose files: their names, the digests of its parts, and the images that
                                    could not be used; written last

A unit (`units.py`) is there as a whole or not at all. Any number of processes may make units of the same folder, each its own.
Records are mapped, not loaded, and verified when a part is first read, so there may be more of them than memory. Other tools can
read them with `numpy.load`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float16, Integer, UInt8

from knn_diffusion.checkpoint import TEMPORARY, atomic_write_bytes, file_digest, write_json
from knn_diffusion.config import from_dict, read_mapping, to_dict
from knn_diffusion.errors import ConfigError, FingerprintError, StoreError, UsageError
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval.stored_array import npy_bytes
from knn_diffusion.tokens.examples import AGAIN, Examples, Makers, Part
from knn_diffusion.tokens.units import Unit

FACTS, UNITS, PARTS = "tokens.json", "units", "parts"
PART_IMAGES = 4096
"""At most so many images of a part; those of a paper-sized image take 3 KB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """What came of some images, in their order.

    skipped   source and reason of those that could not be used
    """

    contents: UInt8[np.ndarray, "images digest"]
    embeddings: Float16[np.ndarray, "images dim"]
    tokens: Integer[np.ndarray, "images seq"]
    skipped: Sequence[Mapping[str, str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitFacts:
    """What is kept of a unit: the files its images lie in, its parts, and the images that could not be used."""

    files: Sequence[str]
    parts: Sequence[Part]
    skipped: Sequence[Mapping[str, str]]


class TokenFolder:
    """The units of one tokenizer and one encoder."""

    def __init__(self, path: Path, makers: Makers) -> None:
        """Open a folder, or begin one.

        Raises: FingerprintError when others made what is there; UsageError when something else lies there.
        """
        self.path, self.makers = path, makers
        facts = path / FACTS
        if not facts.is_file() and not _is_new(path):
            raise UsageError(
                f"expected a folder of tokens ({FACTS}, {UNITS}, {PARTS}) or a new one, {path} is neither: choose another"
            )
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

    @classmethod
    def there(cls, path: Path) -> TokenFolder:
        """The folder as it is, whoever made it. Raises: UsageError when it is none."""
        if not (path / FACTS).is_file():
            raise UsageError(
                f"expected a folder of tokens in {path}, found no {FACTS}: name the folder given to --tokens"
            )
        try:
            return cls(path, from_dict(Makers, read_mapping(path / FACTS), str(path / FACTS)))
        except ConfigError as error:
            raise UsageError(f"expected a folder of tokens in {path}, got {error}") from None

    def problems(self, progress: Progress | None = None) -> list[str]:
        """What is wrong with its files, each in a few words, after reading all of them; empty for a sound one."""
        found, units = list[str](), self.units()
        for number, unit in enumerate(units, 1):
            try:
                facts = self.facts(unit)
            except StoreError as error:
                found.append(str(error))
                continue
            for place, part in enumerate(facts.parts if facts is not None else ()):
                for kind, sha256 in part.sha256.items():
                    file = self._file(unit, place, kind)
                    if not file.is_file():
                        found.append(f"{file.name} is missing")
                    elif file_digest(file) != sha256:
                        found.append(f"{file.name} is damaged")
            if progress is not None:
                progress("checking tokens", number, len(units))
        return found

    def units(self) -> list[str]:
        """The names of all units there are, but those that were set aside."""
        return sorted(path.stem for path in (self.path / UNITS).glob("*.json"))

    def facts(self, unit: str) -> UnitFacts | None:
        """What is kept of a unit, also of one that was set aside; None when it is not there.

        Raises: StoreError when its facts are damaged.
        """
        places = [self._facts(unit), self._aside(unit)]
        place = next((one for one in places if one.is_file()), None)
        if place is None:
            return None
        try:
            found = read_mapping(place)
            parts = [Part(**{name: one[name] for name in ("images", "bytes", "sha256")}) for one in found["parts"]]
            return UnitFacts(files=found["files"], parts=parts, skipped=found["skipped"])
        except (ConfigError, KeyError, TypeError) as error:
            raise StoreError(f"{place} is damaged ({error}): delete it {AGAIN}") from None

    def kept(self, unit: str) -> UnitFacts | None:
        """The facts of a unit that is there with all its files, whole by their sizes, and not set aside; else None."""
        found = self.facts(unit) if self._facts(unit).is_file() else None
        if found is None:
            return None
        for number, part in enumerate(found.parts):
            for kind, size in part.bytes.items():
                file = self._file(unit, number, kind)
                if not file.is_file() or file.stat().st_size != size:
                    return None
        return found

    def write_part(self, unit: str, number: int, made: Made) -> Part:
        """Write the next part of a unit; `close` makes it count.

        Raises: KnnDiffusionError when the disk is full.
        """
        if number == 0:
            self._facts(unit).unlink(missing_ok=True)  # of an earlier making, whose files these replace
        records = np.empty(len(made.contents), self.makers.record)
        records["embedding"], records["tokens"] = made.embeddings, made.tokens
        sizes, digests = {}, {}
        for kind, array in (("examples", records), ("contents", made.contents)):
            content = npy_bytes(array)
            atomic_write_bytes(self._file(unit, number, kind), content)
            sizes[kind], digests[kind] = len(content), hashlib.sha256(content).hexdigest()
        return Part(images=len(records), bytes=sizes, sha256=digests)

    def close(self, unit: str, facts: UnitFacts) -> None:
        """Keep a unit whose parts are written. Raises: KnnDiffusionError when the disk is full; then it is as it was."""
        write_json(self._facts(unit), asdict(facts))
        self._aside(unit).unlink(missing_ok=True)

    def set_aside(self, units: Iterable[Unit]) -> int:
        """Leave out from now on what these units replace: earlier ones of the same files, changed since, or gone.

        Their files stay, for runs that were begun with them. Returns: how many there were.
        """
        now = list(units)
        names, files = {unit.name for unit in now}, {file for unit in now for file in unit.files}
        count = 0
        for name in self.units():
            before = self.facts(name) if files and name not in names else None
            if before is None or not files.intersection(before.files):
                continue
            if all(file in files or not os.path.exists(file) for file in before.files):
                with suppress(FileNotFoundError):  # another process did it
                    os.replace(self._facts(name), self._aside(name))
                count += 1
        return count

    def contents(self, unit: str) -> list[bytes]:
        """The digest of each image of a unit. Raises: StoreError when it is missing or damaged."""
        return [one.tobytes() for one in self.examples([unit]).contents]

    def examples(self, units: Iterable[str] | None = None) -> Examples:
        """The images of these units, or of all there are, in the order of the units' names.

        Raises: StoreError when one is missing or damaged.
        """
        parts, skipped = list[tuple[Path, Part]](), list[Mapping[str, str]]()
        for unit in self.units() if units is None else sorted(units):
            facts = self.facts(unit)
            if facts is None:
                raise StoreError(f"expected the tokens of {unit} in {self.path}, they are missing: make them again")
            parts += [(self.path / PARTS / f"{unit}-{number:04}", part) for number, part in enumerate(facts.parts)]
            skipped += facts.skipped
        return Examples(self.makers, parts, skipped)

    def _file(self, unit: str, number: int, kind: str) -> Path:
        return self.path / PARTS / f"{unit}-{number:04}.{kind}.npy"

    def _facts(self, unit: str) -> Path:
        return self.path / UNITS / f"{unit}.json"

    def _aside(self, unit: str) -> Path:
        return self.path / UNITS / f"{unit}.aside"


def _is_new(path: Path) -> bool:
    """Whether nothing lies there yet, or what another process has begun this moment."""
    if not path.exists():
        return True
    return path.is_dir() and (all(one.name.startswith(TEMPORARY) for one in path.iterdir()) or (path / FACTS).is_file())
