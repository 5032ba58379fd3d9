"""Tokens of an index's images, for denoisers that read their neighbors' grids: made of previews when they are asked for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from threading import Lock

import numpy as np
import torch
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor

from knn_diffusion.models.tokenizer_protocol import Tokenizer
from knn_diffusion.tokens import Tokenize

KEPT = 4096
"""Images whose tokens are kept, the last ones asked for; 8 KiB each with 32 × 32 tokens."""


class NeighborTokens:
    """Reads images by their ids in an index, which are those of their contents; each is encoded by itself."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenize = Tokenize(tokenizer, at_once=1)
        self._seq = tokenizer.grid**2
        self._kept: OrderedDict[str, Int[Tensor, "seq"]] = OrderedDict()
        self._lock = Lock()

    def read(
        self, ids: Sequence[str], count: int, preview: Callable[[str], Image.Image | None]
    ) -> tuple[Int[Tensor, "1 m seq"], Bool[Tensor, "1 m"]]:
        """Tokens of the first `count` images, and which of them there are.

        Absent are those without a preview, or with one smaller than the tokenizer's images: blurred tokens were never trained on.

        Args: preview: gives the picture of an id.
        """
        grids, present = torch.zeros(1, count, self._seq, dtype=torch.long), torch.zeros(1, count, dtype=torch.bool)
        for place, id_ in enumerate(ids[:count]):
            tokens = self._tokens(id_, preview)
            if tokens is not None:
                grids[0, place], present[0, place] = tokens, True
        return grids, present

    def _tokens(self, id_: str, preview: Callable[[str], Image.Image | None]) -> Int[Tensor, "seq"] | None:
        with self._lock:
            if id_ in self._kept:
                self._kept.move_to_end(id_)
                return self._kept[id_]
        picture = preview(id_)
        if picture is None or min(picture.size) < self._tokenize.size:
            return None
        tokens = torch.from_numpy(self._tokenize([picture])[0].astype(np.int64))
        with self._lock:
            self._kept[id_] = tokens
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return tokens
