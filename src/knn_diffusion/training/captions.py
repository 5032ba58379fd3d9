"""Captioned pictures in folders, and which captions are true of which pictures.

`captions.jsonl` has one object a line: `file`, and `caption` or `captions`, the plainest first. `family` may say who drew the picture,
`facts` what holds of it, and `caption_facts` what each caption claims. A folder without the file may give the names of its files as captions.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from knn_diffusion.config import parse_json
from knn_diffusion.errors import UsageError
from knn_diffusion.images import find_files

FILE = "captions.jsonl"
NAMES_SETTING = "captions_from_names"
SIDES = re.compile(r"\b(left|right|leftwards?|rightwards?|clockwise|counterclockwise|east|west)\b", re.IGNORECASE)
COLOURS = re.compile(
    r"\b(red|orange|yellow|green|teal|blue|purple|pink|brown|gr[ea]y|black|white|gold|golden|silver|colou?rful|rainbow)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Captioned:
    """A picture with its captions, the plainest first; pictures with the same plainest one show the same.

    facts: what holds of the picture, None where nobody said; claims: for each caption what must hold for it to be true.
    """

    file: Path
    captions: tuple[str, ...]
    family: str = ""
    facts: frozenset[str] | None = None
    claims: tuple[tuple[str, ...], ...] = ()

    @property
    def may_mirror(self) -> bool:
        """True unless a caption names a side."""
        return not any(SIDES.search(caption) for caption in self.captions)

    @property
    def may_fade(self) -> bool:
        """True unless a caption names a colour."""
        return not any(COLOURS.search(caption) for caption in self.captions)


def read_captioned(sources: Sequence[str | Path], *, from_names: bool = False) -> list[Captioned]:
    """The captioned pictures of some folders, in order.

    Args: from_names: a folder without captions.jsonl gives the names of its picture files as captions, and subfolders
        as families.

    Raises: UsageError when a folder has no captions, or a line is not such an object.
    """
    found: list[Captioned] = []
    for source in map(Path, sources):
        found += _from_names(source) if from_names and not (source / FILE).is_file() else _from_lines(source)
    if not found:
        raise UsageError(f"expected pictures with captions, {FILE} has none: add lines with file and caption")
    return found


def _from_lines(folder: Path) -> list[Captioned]:
    path = folder / FILE
    if not path.is_file():
        raise UsageError(
            f"expected a folder with {FILE}, {folder} has none: write one, or take the names of its files as captions "
            f"(--set {NAMES_SETTING}=true)"
        )
    made = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            made.append(_captioned(folder, parse_json(line)))
        except (ValueError, KeyError, TypeError):
            raise UsageError(
                f'expected {{"file": ..., "caption": ...}} in line {number} of {path}, got {line[:60]!r}: correct it'
            ) from None
    return made


def _captioned(folder: Path, entry: Mapping[str, Any]) -> Captioned:
    texts = entry["captions"] if "captions" in entry else [entry["caption"]]
    claims = entry.get("caption_facts") or []
    if not texts or isinstance(texts, str) or (claims and len(claims) != len(texts)):
        raise ValueError
    facts = entry.get("facts")
    return Captioned(
        folder / entry["file"],
        tuple(map(str, texts)),
        str(entry.get("family") or ""),
        None if facts is None else frozenset(map(str, facts)),
        tuple(tuple(map(str, one)) for one in claims),
    )


def _from_names(folder: Path) -> list[Captioned]:
    """Captions like "red panda" for red-panda_02.png."""
    made = []
    for found in find_files([folder]):
        file = Path(found.path)
        caption = re.sub(r"(?<=\D) ?\d+$", "", re.sub(r"[\W_]+", " ", file.stem)).strip()
        if caption:
            made.append(Captioned(file, (caption,), file.parent.name if file.parent != folder else ""))
    return made


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionTable:
    """The distinct captions of some pictures, and what decides which are true of which.

    A caption is true of a picture if all that it claims is among the picture's facts. A caption whose claims nobody listed
    claims itself; a picture whose facts nobody listed holds all that is claimed of the pictures that show the same.
    """

    texts: list[str]
    """Distinct captions."""
    weights: Int[np.ndarray, "texts"]
    """How many pictures have each as their plainest."""
    groups: Int[np.ndarray, "items"]
    """The same number for pictures that show the same."""
    own: list[Int[np.ndarray, "_"]]
    """Rows of each picture's captions, the plainest first."""
    facts: list[Int[np.ndarray, "_"]]
    """Facts of each picture, by number from 1."""
    claims: Int[np.ndarray, "texts claims"]
    """Facts that each caption claims, filled up with 0."""

    def holds(self, items: Int[np.ndarray, "batch"], rows: Int[np.ndarray, "pool"]) -> Bool[np.ndarray, "batch pool"]:
        """[i, j]: whether the caption of row j is true of picture i."""
        claims = self.claims[rows]
        made = np.empty((len(items), len(rows)), bool)
        known = np.zeros(max(int(self.claims.max()), *(int(self.facts[item].max()) for item in items)) + 1, bool)
        for i, item in enumerate(items):
            known[:] = False
            known[0] = True
            known[self.facts[item]] = True
            made[i] = known[claims].all(1)
        return made

    def digest(self) -> str:
        """A name of the captions and of who has them."""
        total = hashlib.sha256("\n".join(self.texts).encode())
        for rows in self.own:
            total.update(rows.tobytes() + b";")
        return total.hexdigest()


def caption_table(pictures: Sequence[Captioned]) -> CaptionTable:
    """The table of these pictures' captions."""
    row_of: dict[str, int] = {}
    group_of: dict[str, int] = {}
    number_of: dict[str, int] = {}
    claimed: dict[int, tuple[str, ...]] = {}
    shared: dict[str, set[str]] = {}
    shared_claims: dict[str, set[str]] = {}
    own, groups = [], []
    for one in pictures:
        rows = [row_of.setdefault(text, len(row_of)) for text in one.captions]
        own.append(np.array(rows, np.int64))
        groups.append(group_of.setdefault(one.captions[0], len(group_of)))
        shared.setdefault(one.captions[0], set()).update(map(_itself, one.captions))
        shared_claims.setdefault(one.captions[0], set()).update(claim for claims in one.claims for claim in claims)
        for row, claims in zip(rows, one.claims or [()] * len(rows), strict=True):
            if not claimed.get(row):
                claimed[row] = claims
    all_claims = [claimed[row] or (_itself(text),) for text, row in row_of.items()]
    facts = [
        shared[plain] | (shared_claims[plain] if one.facts is None else one.facts)
        for one, plain in ((one, one.captions[0]) for one in pictures)
    ]
    return CaptionTable(
        texts=list(row_of),
        weights=_counted([int(rows[0]) for rows in own], len(row_of)),
        groups=np.array(groups),
        own=own,
        facts=[np.array([number_of.setdefault(f, len(number_of) + 1) for f in sorted(held)]) for held in facts],
        claims=_padded([[number_of.setdefault(f, len(number_of) + 1) for f in one] for one in all_claims]),
    )


def _itself(caption: str) -> str:
    return f"caption={caption}"


def _counted(rows: Sequence[int], count: int) -> Int[np.ndarray, "texts"]:
    found = Counter(rows)
    return np.array([found[row] for row in range(count)])


def _padded(rows: Sequence[Sequence[int]]) -> Int[np.ndarray, "texts claims"]:
    most = max(map(len, rows))
    return np.array([[*row, *[0] * (most - len(row))] for row in rows])
