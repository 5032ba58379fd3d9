"""Tokens of images beside an index: made in the pass that adds them, or alone for a training that only reads the index.

Either way an image is decoded once, and its embedding is that of the index where the index has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from knn_diffusion.image_index.distributed import DEADLY
from knn_diffusion.image_index.embedding import Known, Outcome, Row, Skipped, embed
from knn_diffusion.image_index.imported import ImportedNames
from knn_diffusion.images import SourceImage
from knn_diffusion.models.encoders import JointEncoder
from knn_diffusion.models.tokenizer_protocol import Tokenizer
from knn_diffusion.models.tokenizers import load_tokenizer
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval.segments import Snapshot, stored_rows
from knn_diffusion.retrieval.store import Store
from knn_diffusion.tokens import CONTENT_BYTES, Made, TokenFolder, Tokenize, Unit, makers_of, units_of

REMOVED = "it was removed from the index while its tokens were made: give the command again"


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


class Recorder:
    """Outcomes of images on their way into a folder of tokens, a unit at a time; what is there already is left out."""

    def __init__(self, folder: TokenFolder, found: Sequence[SourceImage], store: Store) -> None:
        self.folder, self.store = folder, store
        units = units_of(found)
        done = {unit.name for unit in units if self._is_complete(unit)}
        self.units = [unit for unit in units if unit.name not in done]
        """Those whose images are to be given outcomes of, in their order."""
        self.skipped = folder.examples(unit.name for unit in units if unit.name in done).skipped
        """Images of the others that could not be used."""
        self._left = iter(self.units)
        self._open: Unit | None = None
        self._outcomes: list[Outcome] = []

    def take(self, outcome: Outcome) -> bool:
        """Note one outcome, and say whether it ends a unit: once the store has its images, `keep` is due."""
        self._open = self._open or next(self._left)
        self._outcomes.append(outcome)
        return len(self._outcomes) == len(self._open.images)

    def keep(self) -> None:
        """Write the part of the unit that ended; not where workers died, so that its images are tried again another time."""
        assert self._open is not None
        if not any(isinstance(one, Skipped) and one.reason == DEADLY for one in self._outcomes):
            self.folder.write(self._open.name, made_of(self._outcomes, self.store))
        self._open, self._outcomes = None, []

    def _is_complete(self, unit: Unit) -> bool:
        """Whether its tokens are kept, and the index has its images."""
        contents = self.folder.contents(unit.name) if unit.name in self.folder else []
        rows = self.store.consistently(lambda now: self.store.rows_of_contents(contents, now))
        return bool(contents) and bool((rows >= 0).all())


def tokenize_units(
    units: Sequence[Unit],
    folder: TokenFolder,
    tokenize: Tokenize,
    store: Store,
    encoder: JointEncoder,
    progress: Progress | None = None,
) -> None:
    """Make the parts of these units that are not there, and leave the store as it is."""
    missing = [unit for unit in units if unit.name not in folder]
    total, done = sum(len(unit.images) for unit in missing), 0
    names = ImportedNames(store) if missing else None
    for unit in missing:
        named = names.contents_of(unit.images, encoder) if names is not None else {}

        def is_known(source: SourceImage, content: str, named: dict[str, str] = named) -> str | None:
            return content if store.id_of_content(content) is not None else named.get(source.source)

        outcomes = list[Outcome]()
        for outcome in embed(unit.images, encoder, False, is_known, tokenize):
            outcomes.append(outcome)
            done += 1
            if progress is not None:
                progress("tokenizing", done, total)
        folder.write(unit.name, made_of(outcomes, store))


def made_of(outcomes: Sequence[Outcome], store: Store) -> Made:
    """The images with tokens among these outcomes, with the vectors that the store has of them."""
    held = [one for one in outcomes if isinstance(one, Row | Known)]
    contents = [bytes.fromhex(one.item.content if isinstance(one, Row) else one.content) for one in held]
    vectors = np.zeros((len(held), store.encoder.dim), np.float16)
    if new := [place for place, one in enumerate(held) if isinstance(one, Row)]:
        given = np.stack([one.vector for one in held if isinstance(one, Row)])
        vectors[new] = stored_rows(given, store.encoder.dim, "embeddings")
    known = np.array([place for place, one in enumerate(held) if isinstance(one, Known)], np.int64)

    def read(now: Snapshot) -> Int[np.ndarray, "known"]:
        rows = store.rows_of_contents([contents[place] for place in known], now)
        vectors[known[rows >= 0]] = store.embeddings(rows[rows >= 0], now)
        return rows

    gone = {int(place) for place in known[store.consistently(read) < 0]}
    kept = [place for place in range(len(held)) if place not in gone]
    seq = [one.tokens for one in held if one.tokens is not None]
    skipped = [asdict(one) for one in outcomes if isinstance(one, Skipped)]
    skipped += [{"source": contents[place].hex(), "reason": REMOVED} for place in sorted(gone)]
    return Made(
        contents=np.frombuffer(b"".join(contents[place] for place in kept), np.uint8).reshape(-1, CONTENT_BYTES),
        embeddings=vectors[kept],
        tokens=np.stack(seq)[kept] if kept else np.zeros((0, 0), np.uint16),
        skipped=skipped,
    )
