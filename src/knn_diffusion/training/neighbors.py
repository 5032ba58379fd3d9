"""What the denoiser trains on: each image's tokens, its embedding and its neighbors' — computed once, then memory-mapped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, Integer, UInt8
from PIL import Image
from torch import Tensor

from knn_diffusion import images
from knn_diffusion.checkpoint import weights_digest
from knn_diffusion.errors import UsageError
from knn_diffusion.image_index import ImageIndex
from knn_diffusion.models.encoders import JointEncoder
from knn_diffusion.models.tokenizer_protocol import Tokenizer
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval.neighbors import EVERY_PAIR
from knn_diffusion.training.data import Batch, PixelSet, cached_array

CHUNK = 256
TOKENIZED_PIXELS = 2**20
"""Pixels that a tokenizer sees at once: 256 images of 64 pixels, 16 of 256, some gigabytes in a paper-sized network."""
ABSENT = -1
WHOLE = "neighbors-of-the-index.npy"
"""The lists of all images of the index, until those of the run's own images are kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DenoiserData:
    """Images as the denoiser sees them; a `Dataset`.

    tokens      [items, seq] codes of the tokenizer
    queries     [items, dim] each image's own embedding
    neighbors   [items, k] rows of `table`, nearest first, -1 where there are fewer; never the image itself
    table       [rows, dim] embeddings of the index
    """

    tokens: Integer[np.ndarray, "items seq"]
    queries: Float[np.ndarray, "items dim"]
    neighbors: Int[np.ndarray, "items k"]
    table: Float[np.ndarray, "rows dim"]

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, indices: Int[Tensor, "batch"], generator: torch.Generator) -> Batch:
        """`tokens`, `query`, `neighbors` and `present` of these images."""
        rows = indices.numpy()
        neighbors = self.neighbors[rows]
        return {
            "tokens": torch.from_numpy(self.tokens[rows].astype(np.int64)),
            "query": torch.from_numpy(self.queries[rows].astype(np.float32)),
            "neighbors": torch.from_numpy(self.table[neighbors.clip(0)].astype(np.float32)),
            "present": torch.from_numpy(neighbors != ABSENT),
        }

    def split(self, validation: int) -> tuple[DenoiserData, DenoiserData]:
        """The first items for training, the last `validation` for judging it; both may neighbor the whole index."""
        cut = len(self) - validation
        return self._rows(slice(0, cut)), self._rows(slice(cut, None))

    def _rows(self, rows: slice) -> DenoiserData:
        return DenoiserData(
            tokens=self.tokens[rows], queries=self.queries[rows], neighbors=self.neighbors[rows], table=self.table
        )


def prepare(
    pixels: PixelSet, index: ImageIndex, tokenizer: Tokenizer, k: int, cache: Path, progress: Progress | None = None
) -> DenoiserData:
    """Lines 2, 5 and 7 of Algorithm 1 for all images, each kept in `cache` under what it was made from.

    Raises: UsageError when the index is too small to give any image k neighbors besides itself, or is changed meanwhile.
    """
    if k and len(index) < k + 1:
        raise UsageError(
            f"expected an index of more than {k} images, got {len(index)}: add images or train with fewer neighbors "
            f"(--set conditioning.k={max(0, len(index) - 1)})"
        )
    encoder = index.encoder
    tokens = cached_array(
        cache, "tokens", {"pixels": pixels.digest, "tokenizer": weights_digest(tokenizer.state_dict()), "config": tokenizer.config},
        lambda: encode_tokens(pixels.array, tokenizer, progress),
    )  # fmt: skip
    queries = cached_array(
        cache, "embeddings", {"pixels": pixels.digest, "encoder": encoder.fingerprint},
        lambda: encode_images(pixels.array, encoder, progress),
    )  # fmt: skip
    digest = index.digest

    def of_one_moment() -> Int[np.ndarray, "items k"]:
        found = find_neighbors(queries, pixels.ids, index, k, progress, cache)
        _require_unchanged(index, digest)
        return found

    facts = {"pixels": pixels.digest, "index": digest, "k": k}
    neighbors, table = cached_array(cache, "neighbors", facts, of_one_moment), index.embeddings
    (cache / WHOLE).unlink(missing_ok=True)
    _require_unchanged(index, digest)
    return DenoiserData(tokens=tokens, queries=queries, neighbors=neighbors, table=table)


def _require_unchanged(index: ImageIndex, digest: str) -> None:
    """Raise UsageError when the rows of neighbors may be those of other images by now."""
    if index.digest != digest:
        raise UsageError(
            f"expected an index that nobody changes while neighbors are looked up, {index.folder or 'that in memory'} was "
            "changed: give the same command again, or train with a copy of the index"
        )


def encode_tokens(
    array: UInt8[np.ndarray, "items height width 3"], tokenizer: Tokenizer, progress: Progress | None = None
) -> Integer[np.ndarray, "items seq"]:
    """The codes of every image, in the smallest integer type that holds them."""
    kind = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    device = next(tokenizer.parameters()).device
    at_once = max(1, TOKENIZED_PIXELS // array[0, ..., 0].size)
    parts = []
    for start in range(0, len(array), at_once):
        pixels = images.pixels_from_uint8(array[start : start + at_once]).to(device)
        parts.append(tokenizer.encode(pixels).cpu().numpy().astype(kind))
        _tell(progress, "tokenizing", start + at_once, len(array))
    return np.concatenate(parts)


def encode_images(
    array: UInt8[np.ndarray, "items height width 3"], encoder: JointEncoder, progress: Progress | None = None
) -> Float[np.ndarray, "items dim"]:
    """The embedding of every image, float16 as the index keeps them."""
    parts = []
    for start in range(0, len(array), CHUNK):
        pictures = [Image.fromarray(one) for one in array[start : start + CHUNK]]
        parts.append(encoder.encode_images(pictures).astype(np.float16))
        _tell(progress, "embedding", start + CHUNK, len(array))
    return np.concatenate(parts)


def find_neighbors(
    queries: Float[np.ndarray, "items dim"],
    ids: Sequence[str],
    index: ImageIndex,
    k: int,
    progress: Progress | None = None,
    cache: Path | None = None,
) -> Int[np.ndarray, "items k"]:
    """Rows of the K nearest images of every image, itself and its near-duplicates left out (Eq. 4, A.4).

    When the index is large and holds every image, all its neighbor lists are made at once, which is far cheaper; with a
    `cache` folder an interrupted call goes on there.
    """
    if k and len(index) > EVERY_PAIR:
        places = {one: place for place, one in enumerate(index.ids)}
        own = np.array([places.get(one, ABSENT) for one in ids])
        if (own >= 0).all():
            whole = cache / WHOLE if cache is not None else None
            return index.self_neighbors(k, output=whole, progress=progress)[own]
    table = np.full((len(queries), k), ABSENT, np.int32)
    for start in range(0, len(queries) if k else 0, CHUNK):
        rows = slice(start, start + CHUNK)
        found = index.neighbor_rows(queries[rows].astype(np.float32), k, exclude_ids=[[one] for one in ids[rows]])
        table[rows] = found
        _tell(progress, "finding neighbors", start + CHUNK, len(queries))
    return table


def _tell(progress: Progress | None, what: str, done: int, total: int) -> None:
    if progress is not None:
        progress(what, min(done, total), total)
