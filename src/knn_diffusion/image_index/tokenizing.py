"""Tokens of images beside an index: made in the pass that adds them, or alone for a training that only reads the index.

Either way an image is decoded once, and its embedding is that of the index where the index has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from knn_diffusion.image_index.embedding import Group, Known, Outcome, Row, Skipped, embed
from knn_diffusion.image_index.imported import ImportedNames
from knn_diffusion.images import SourceImage
from knn_diffusion.models.encoders import JointEncoder
from knn_diffusion.models.tokenizer_protocol import Tokenizer
from knn_diffusion.models.tokenizers import load_tokenizer
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval.segments import Snapshot, stored_rows
from knn_diffusion.retrieval.store import Store
from knn_diffusion.tokens import (
    CONTENT_BYTES,
    PART_IMAGES,
    Made,
    TokenFolder,
    Tokenize,
    Unit,
    UnitFacts,
    makers_of,
    units_of_images,
)

REMOVED = "it was removed from the index while its tokens were made"


@dataclass(frozen=True, slots=True)
class TokenOutput:
    """What makes tokens, a tokenizer or its folder; and the folder where they are kept."""

    tokenizer: Tokenizer | str | Path
    folder: str | Path

    def opened(self, encoder: JointEncoder) -> tuple[TokenFolder, Tokenize]:
        """The folder, and the tokenizer as a function.

        Raises: CheckpointError when there is no tokenizer; what TokenFolder raises.
        """
        tokenizer = self.tokenizer
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(Path(tokenizer))[0]
        makers = makers_of(tokenizer, encoder=encoder.fingerprint, dim=encoder.dim)
        return TokenFolder(Path(self.folder), makers), Tokenize(tokenizer)


class UnitRecorder:
    """Outcomes of a unit's images on their way into a folder of tokens.

    Of a unit that is kept already only the images that could not be used are tried again.
    """

    def __init__(self, folder: TokenFolder, unit: Unit, kept: UnitFacts | None, store: Store) -> None:
        self._folder, self._unit, self._store = folder, unit, store
        skipped = {one["source"] for one in kept.skipped} if kept is not None else set()
        every = unit.open() if kept is None or skipped else []
        self.images = [one for one in every if kept is None or one.source in skipped]
        """Those to be given outcomes of, in their order."""
        self._parts = list(kept.parts) if kept is not None else []
        self._skipped: list[Mapping[str, str]] = []
        self._outcomes: list[Outcome] = []
        self._done = 0

    @property
    def is_whole(self) -> bool:
        """Whether all outcomes were given."""
        return self._done + len(self._outcomes) == len(self.images)

    def take(self, outcome: Outcome) -> bool:
        """Note one outcome, and say whether it ends a part: once the store has its images, `keep` is due."""
        self._outcomes.append(outcome)
        return self.is_whole or len(self._outcomes) == PART_IMAGES

    def keep(self) -> None:
        """Write the part that ended; with the last one the unit is kept."""
        images = self.images[self._done : self._done + len(self._outcomes)]
        made = made_of(images, self._outcomes, self._store)
        if len(made.contents):
            self._parts.append(self._folder.write_part(self._unit.name, len(self._parts), made))
        self._skipped += made.skipped
        self._done, self._outcomes = self._done + len(images), []
        if self.is_whole:
            facts = UnitFacts(files=self._unit.files, parts=self._parts, skipped=self._skipped)
            self._folder.close(self._unit.name, facts)


class Recorder:
    """Outcomes of many units' images, one unit after the other; what is kept and in the index is left out.

    Images whose tokens are kept though the index lacks some of them are given outcomes of, but no tokens are made or written.
    """

    def __init__(self, folder: TokenFolder, found: Sequence[SourceImage], store: Store) -> None:
        self._folder, self._store = folder, store
        self._units = units_of_images(found)
        self.groups: list[Group] = []
        """The images to be given outcomes of, unit by unit."""
        self._todo: list[UnitRecorder | None] = []
        for unit in self._units:
            kept = folder.kept(unit.name)
            if kept is not None and not self._has_all(unit):
                self.groups.append(Group(unit.open(), tokenized=False))
                self._todo.append(None)
                continue
            recorder = UnitRecorder(folder, unit, kept, store)
            if recorder.images:
                self.groups.append(Group(recorder.images))
                self._todo.append(recorder)
        self._group, self._given = 0, 0

    def take(self, outcome: Outcome) -> bool:
        """As UnitRecorder.take."""
        while self._given == len(self.groups[self._group].images):
            self._group, self._given = self._group + 1, 0
        self._given += 1
        recorder = self._todo[self._group]
        return recorder is not None and recorder.take(outcome)

    def keep(self) -> None:
        """As UnitRecorder.keep."""
        recorder = self._todo[self._group]
        assert recorder is not None
        recorder.keep()

    def finish(self) -> None:
        """Set aside what the units replace."""
        self._folder.set_aside(self._units)

    def _has_all(self, unit: Unit) -> bool:
        """Whether the index has the images of a unit that is kept."""
        contents = self._folder.contents(unit.name)
        return bool((self._store.consistently(lambda now: self._store.rows_of_contents(contents, now)) >= 0).all())


def tokenize_units(
    units: Sequence[Unit],
    folder: TokenFolder,
    tokenize: Tokenize,
    store: Store,
    encoder: JointEncoder,
    *,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> None:
    """Make those of these units that are not there, and leave the store as it is.

    Args: progress: told of images; how many there are is guessed from the shards that were opened.
    """
    names = ImportedNames(store, encoder, notice)
    opened, found, done = 0, 0, 0
    for number, unit in enumerate(units):
        kept = folder.kept(unit.name)
        recorder = UnitRecorder(folder, unit, kept, store)
        opened, found = opened + (kept is None), found + len(recorder.images)
        total = found + (len(units) - number - 1) * found // max(1, opened)
        named = names.contents_of(recorder.images)

        def is_known(source: SourceImage, content: str, named: Mapping[str, str] = named) -> str | None:
            return content if store.id_of_content(content) is not None else named.get(source.source)

        for outcome in embed(recorder.images, encoder, None, is_known, tokenize):
            done += 1
            if recorder.take(outcome):
                recorder.keep()
            if progress is not None:
                progress("tokenizing", done, total)
        if kept is None and not recorder.images:
            recorder.keep()  # a table of facts alone: it need not be opened again


def made_of(images: Sequence[SourceImage], outcomes: Sequence[Outcome], store: Store) -> Made:
    """Those of the images that have tokens, with the vectors that the store has of them; and those of no use."""
    pairs = list(zip(images, outcomes, strict=True))
    held = [(image, one, one.tokens) for image, one in pairs if isinstance(one, Row | Known) and one.tokens is not None]
    contents = [bytes.fromhex(one.item.content if isinstance(one, Row) else one.content) for _, one, _ in held]
    vectors = np.zeros((len(held), store.encoder.dim), np.float16)
    known = np.array([place for place, (_, one, _) in enumerate(held) if isinstance(one, Known)], np.int64)
    if rows := [(place, one.vector) for place, (_, one, _) in enumerate(held) if isinstance(one, Row)]:
        vectors[[place for place, _ in rows]] = stored_rows(
            np.stack([row for _, row in rows]), store.encoder.dim, "rows"
        )

    def read(now: Snapshot) -> Int[np.ndarray, "known"]:
        rows = store.rows_of_contents([contents[place] for place in known], now)
        vectors[known[rows >= 0]] = store.embeddings(rows[rows >= 0], now)
        return rows

    there = np.ones(len(held), bool)
    there[known] = store.consistently(read) >= 0
    kept = np.flatnonzero(there)
    gone = [Skipped(source=held[place][0].source, reason=REMOVED) for place in np.flatnonzero(~there)]
    return Made(
        contents=np.frombuffer(b"".join(contents[place] for place in kept), np.uint8).reshape(-1, CONTENT_BYTES),
        embeddings=vectors[kept],
        tokens=np.stack([held[place][2] for place in kept]) if len(kept) else np.zeros((0, 0), np.uint16),
        skipped=[asdict(one) for one in (*(one for one in outcomes if isinstance(one, Skipped)), *gone)],
    )
