"""What an encoder in training is judged by: do plain captions find the pictures that were set aside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from knn_diffusion import images
from knn_diffusion.models.sticker_encoder import StickerJointEncoder
from knn_diffusion.shapes import Embeddings
from knn_diffusion.training.captioned_pictures import CaptionedPictures
from knn_diffusion.training.captions import Captioned

NEAREST = 5
PREVIEW_ROWS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderValidation:
    """Pictures that were not trained on, their plain captions, the group that each shows and the family that drew it."""

    pictures: UInt8[np.ndarray, "items size size 3"]
    captions: Sequence[str]
    groups: Int[np.ndarray, "items"]
    families: Sequence[str]

    def judge(self, encoder: StickerJointEncoder) -> dict[str, float]:
        """How often a caption finds its picture first, and among five: of all pictures, and of those of each family."""
        if not len(self.pictures):
            return {}
        found, texts = encoder.encode_arrays(self.pictures), encoder.encode_texts(self.captions)
        metrics = self._found(found, texts, np.arange(len(found)), "")
        names = sorted(set(self.families))
        for name in names if len(names) > 1 else []:
            rows = np.array([i for i, family in enumerate(self.families) if family == name])
            metrics |= self._found(found, texts, rows, f"/{name}")
        return metrics

    def _found(self, found: Embeddings, texts: Embeddings, rows: Int[np.ndarray, "rows"], of: str) -> dict[str, float]:
        order = np.argsort(-(texts[rows] @ found[rows].T), axis=1, kind="stable")[:, :NEAREST]
        right = self.groups[rows][order] == self.groups[rows][:, None]
        return {f"top1{of}": float(right[:, 0].mean()), f"top5{of}": float(right.any(1).mean())}

    def preview(self, encoder: StickerJointEncoder) -> Image.Image | None:
        """Some captions, each with its five nearest pictures."""
        if not len(self.pictures):
            return None
        some = list(range(0, len(self.captions), max(1, len(self.captions) // PREVIEW_ROWS)))[:PREVIEW_ROWS]
        likeness = encoder.encode_texts([self.captions[i] for i in some]) @ encoder.encode_arrays(self.pictures).T
        order = np.argsort(-likeness, axis=1, kind="stable")[:, :NEAREST]
        shown = [images.from_array(self.pictures[i]) for row in order for i in row]
        labels = [self.captions[i] if rank == 0 else "" for i in some for rank in range(order.shape[1])]
        return images.grid(shown, order.shape[1], 96, labels)


def validation_of(pictures: CaptionedPictures, found: Sequence[Captioned]) -> EncoderValidation:
    """The pictures that were set aside, as the encoder reads them."""
    trained = set(pictures.trained.tolist())
    rows = [row for row in range(len(found)) if row not in trained]
    ground = (pictures.ground,) * 3
    read = [
        images.to_array(images.on_ground(images.frame(images.open_image(found[row].file), pictures.size), ground))
        for row in rows
    ]
    return EncoderValidation(
        pictures=np.stack(read) if read else np.empty((0, pictures.size, pictures.size, 3), np.uint8),
        captions=[found[row].captions[0] for row in rows],
        groups=pictures.table.groups[rows],
        families=[found[row].family for row in rows],
    )
