"""Framed pictures with their captions, as the encoder's training draws them: pairs that show the same, and a pool of captions.

Sentence vectors of a frozen text tower do not change, so each distinct caption is read once and its vector kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from knn_diffusion import images
from knn_diffusion.device import choose_dtype
from knn_diffusion.models.text_tower import SentenceEncoder
from knn_diffusion.progress import Progress
from knn_diffusion.training.captions import Captioned, CaptionTable, caption_table
from knn_diffusion.training.data import Batch, cached_array
from knn_diffusion.training.views import ViewConfig, views

SENTENCES_AT_ONCE = 64
PLAINEST = 0.5
"""Share of pictures that are drawn with their plainest caption; the others get any of theirs."""
RICHER = 0.3
"""Weight of a caption that is no picture's plainest, in the draw of a pool."""
VALIDATED = 0.03
MOST_VALIDATED = 600


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionedPictures:
    """Framed RGBA pictures, the table of their captions, and the captions' sentence vectors."""

    pixels: UInt8[np.ndarray, "items height width 4"]
    families: Int[np.ndarray, "items"]
    table: CaptionTable
    sentences: Float[np.ndarray, "texts text_width"]
    may_mirror: Bool[np.ndarray, "items"]
    may_fade: Bool[np.ndarray, "items"]
    trained: Int[np.ndarray, "trained"]
    """Rows of the pictures that are trained on; the others serve validation."""
    view: ViewConfig
    size: int
    """Side of a view in pixels."""
    ground: int
    pool: int
    """Captions that a picture's own is told from, in each step."""
    drawn: Int[np.ndarray, "drawn"] = field(init=False)
    """Rows of the trained pictures, twice where another family shows the same: the others are their own partners."""
    peers: list[Int[np.ndarray, "_"]] = field(init=False)
    """Rows of the trained pictures of each group."""

    def __post_init__(self) -> None:
        peers: list[list[int]] = [[] for _ in range(int(self.table.groups.max()) + 1)]
        for row in self.trained:
            peers[self.table.groups[row]].append(row)
        object.__setattr__(self, "peers", [np.array(rows, np.int64) for rows in peers])
        shared = np.array([len({int(self.families[row]) for row in rows}) > 1 for rows in peers])
        drawn = np.repeat(self.trained, 1 + shared[self.table.groups[self.trained]])
        object.__setattr__(self, "drawn", drawn)

    def __len__(self) -> int:
        return len(self.drawn)

    def batch(self, indices: Int[Tensor, "batch"], generator: torch.Generator) -> Batch:
        """Two pictures that show the same, from two families where there are two, for each index; captions for all.

        Returns: `pixels` [2 batch, 3, size, size], the second halves of the pairs behind all first ones; `sentences` [pool, text_width];
            `own`, the place of each picture's caption in the pool; `true` [2 batch, pool], the captions that are true of each; and
            `same` [2 batch, 2 batch], the pictures that show the same.
        """
        first = self.drawn[indices.numpy()].tolist()
        rows = first + [self._partner(row, u) for row, u in zip(first, _uniform(len(first), generator), strict=True)]
        uniform = _uniform((len(rows), 2), generator)
        captions = np.array([self._caption(row, u, v) for row, (u, v) in zip(rows, uniform, strict=True)])
        pool = self._pool(captions, generator)
        place = np.full(len(self.table.texts), -1)
        place[pool] = np.arange(len(pool))
        groups = self.table.groups[rows]
        pixels = views(
            self.pixels[rows],
            self.size,
            self.ground,
            self.view,
            generator,
            may_mirror=self.may_mirror[rows],
            may_fade=self.may_fade[rows],
        )
        return {
            "pixels": pixels,
            "sentences": torch.from_numpy(self.sentences[pool].astype(np.float32)),
            "own": torch.from_numpy(place[captions]),
            "true": torch.from_numpy(self.table.holds(np.array(rows), pool)),
            "same": torch.from_numpy(groups[:, None] == groups),
        }

    def _partner(self, row: int, u: float) -> int:
        """Another picture of the same, of another family if possible; the picture itself where there is none."""
        peers = self.peers[self.table.groups[row]]
        others = peers[self.families[peers] != self.families[row]]
        if not len(others):
            others = peers
        return int(others[int(u * len(others))])

    def _caption(self, row: int, u: float, v: float) -> int:
        own = self.table.own[row]
        return int(own[0] if u < PLAINEST else own[int(v * len(own))])

    def _pool(self, captions: Int[np.ndarray, "batch"], generator: torch.Generator) -> Int[np.ndarray, "pool"]:
        """The given captions, and others drawn without replacement, by how many pictures have them as their plainest.

        Source: Efraimidis and Spirakis 2006, as logarithms.
        """
        weights = self.table.weights + RICHER
        rank = torch.rand(len(weights), generator=generator, dtype=torch.float64).log().numpy() / weights
        rank[captions] = 0
        room = max(self.pool, len(captions))
        return np.argpartition(-rank, room)[:room] if room < len(weights) else np.arange(len(weights))


def captioned_pictures(
    found: Sequence[Captioned],
    sentence_encoder: SentenceEncoder,
    cache: Path,
    *,
    size: int,
    ground: int,
    pool: int,
    view: ViewConfig,
    report: Progress | None = None,
) -> CaptionedPictures:
    """The pictures framed at 4/3 of the encoder's side and their captions read; both are kept in `cache`.

    Some of the pictures whose group has another are set aside for validation, by a digest of their names.

    Raises: ImageError when a picture is unreadable.
    """
    table = caption_table(found)
    side = size * 4 // 3
    digest = hashlib.sha256("".join(f"{one.file} {one.file.stat().st_size};" for one in found).encode()).hexdigest()

    def decode() -> np.ndarray:
        pixels = np.empty((len(found), side, side, 4), np.uint8)
        for i, one in enumerate(found):
            pixels[i] = np.asarray(images.frame(images.open_image(one.file), side).convert("RGBA"))
            if report is not None:
                report("decoding images", i + 1, len(found))
        return pixels

    families = {name: number for number, name in enumerate(sorted({one.family for one in found}))}
    return CaptionedPictures(
        pixels=cached_array(cache, "framed", {"files": digest, "side": side, "framing": images.FRAMING}, decode),
        families=np.array([families[one.family] for one in found]),
        table=table,
        sentences=sentence_vectors(table.texts, sentence_encoder, cache, report),
        may_mirror=np.array([one.may_mirror for one in found]),
        may_fade=np.array([one.may_fade for one in found]),
        trained=trained_rows(found, table),
        view=view,
        size=size,
        ground=ground,
        pool=pool,
    )


def trained_rows(found: Sequence[Captioned], table: CaptionTable) -> Int[np.ndarray, "trained"]:
    """Rows of the pictures to train on: all but a few of those whose group has another picture."""
    left = np.bincount(table.groups)
    order = sorted(range(len(found)), key=lambda row: hashlib.sha256(str(found[row].file.name).encode()).digest())
    aside: set[int] = set()
    for row in order:
        if len(aside) >= min(MOST_VALIDATED, VALIDATED * len(found)):
            break
        if left[table.groups[row]] > 1:
            left[table.groups[row]] -= 1
            aside.add(row)
    return np.array([row for row in range(len(found)) if row not in aside])


def sentence_vectors(
    texts: Sequence[str], encoder: SentenceEncoder, cache: Path, report: Progress | None = None
) -> Float[np.ndarray, "texts text_width"]:
    """Sentence vectors in float16, in the order of `texts`, computed once with the fastest arithmetic at hand."""

    def compute() -> np.ndarray:
        device = encoder.tower.words.weight.device
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        made = np.empty((len(texts), encoder.dim), np.float16)
        dtype = choose_dtype(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            for start in range(0, len(order), SENTENCES_AT_ONCE):
                rows = order[start : start + SENTENCES_AT_ONCE]
                made[rows] = encoder.encode([texts[i] for i in rows], SENTENCES_AT_ONCE).half().cpu().numpy()
                if report is not None:
                    report("reading captions", start + len(rows), len(texts))
        return made

    weight = encoder.tower.words.weight
    facts = {"texts": "\n".join(texts), "tower": (float(weight.sum()), tuple(weight.shape))}
    return cached_array(cache, "sentences", facts, compute)


def _uniform(shape: int | tuple[int, ...], generator: torch.Generator) -> Any:
    """Numbers in [0, 1), as nested lists."""
    return torch.rand(shape, generator=generator, dtype=torch.float64).tolist()
