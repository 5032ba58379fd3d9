"""The encoder of stickers: EfficientNet features of the framed picture, and a linear map of frozen sentence vectors.

It plays the part of CLIP (Radford et al. 2021) where CLIP cannot be had. Every family of stickers draws a cat in its own way; a network
that has seen photographs, trained on several families, knows one of a family that it never saw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from knn_diffusion import images as pictures
from knn_diffusion.checkpoint import weights_digest
from knn_diffusion.config import config, require
from knn_diffusion.models.efficientnet import EfficientNet, EfficientNetConfig
from knn_diffusion.models.fixed_batches import in_fixed_batches
from knn_diffusion.models.text_tower import SentenceEncoder
from knn_diffusion.shapes import Embeddings

HEAD_GAIN = 0.2
"""First weights of the image head over those usual. Vectors are normalised, so smaller ones learn faster than the backbone."""


@config
class StickerEncoderConfig:
    """Shape of both sides; the defaults are the bundled encoder (3.9 million parameters)."""

    backbone: EfficientNetConfig = field(default_factory=EfficientNetConfig)
    """The convolutional network."""
    size: int = 96
    """Side of the framed picture in pixels; a multiple of the backbone's stride."""
    dim: int = 256
    """Width of the joint space H."""
    place_width: int = 32
    """Channels that the head reads cell by cell, for what stands where; it reads all channels averaged over the cells."""
    text_width: int = 384
    """Length of the sentence vectors."""
    ground: int = 191
    """Grey level under transparent pictures, 0 … 255; black and white art both show on it."""

    def __post_init__(self) -> None:
        for name in ("size", "dim", "place_width", "text_width"):
            require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        stride = self.backbone.stride
        require(self.size % stride == 0, "size", self.size, f"a multiple of {stride}")
        require(0 <= self.ground <= 255, "ground", self.ground, "from 0 to 255")


class StickerEncoder(nn.Module):
    """The trained part: image tower and text head."""

    def __init__(self, cfg: StickerEncoderConfig) -> None:
        super().__init__()
        self.config = cfg
        self.backbone = EfficientNet(cfg.backbone)
        width, cells = cfg.backbone.width, (cfg.size // cfg.backbone.stride) ** 2
        self.meaning = nn.Linear(width, cfg.dim, bias=False)
        self.places = nn.Conv2d(width, cfg.place_width, 1)
        self.arrangement = nn.Linear(cfg.place_width * cells, cfg.dim)
        nn.init.normal_(self.meaning.weight, std=HEAD_GAIN * width**-0.5)
        nn.init.normal_(self.arrangement.weight, std=HEAD_GAIN * (cfg.place_width * cells) ** -0.5)
        nn.init.zeros_(self.arrangement.bias)
        self.register_buffer("text_center", torch.zeros(cfg.text_width))
        self.text_center: Tensor
        self.text_head = nn.Linear(cfg.text_width, cfg.dim)
        nn.init.orthogonal_(self.text_head.weight)
        nn.init.zeros_(self.text_head.bias)

    def embed_images(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit vectors of framed pictures on their ground, in [-1, 1]; float32."""
        features = self.backbone.features(pixels)  # batch 1280 3 3
        arranged = self.arrangement(F.relu(self.places(features)).flatten(1))
        return F.normalize((self.meaning(features.mean((2, 3))) + arranged).float(), dim=-1)

    def embed_texts(self, sentences: Float[Tensor, "batch text_width"]) -> Float[Tensor, "batch dim"]:
        """Unit vectors of texts from their frozen sentence vectors, float32."""
        return F.normalize(self.text_head(sentences - self.text_center).float(), dim=-1)


class StickerJointEncoder:
    """A `StickerEncoder` over a frozen sentence encoder: pictures and texts in, vectors of H out."""

    def __init__(
        self,
        network: StickerEncoder,
        sentences: SentenceEncoder,
        name: str = "stickers",
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self.sentences = sentences
        self.name = name
        self.facts = dict(facts or {})
        self.fingerprint = self._fingerprint()

    @property
    def dim(self) -> int:
        """Width of H."""
        return self.network.config.dim

    def to(self, device: torch.device | str) -> StickerJointEncoder:
        """Work on that device; returns itself."""
        self.network.to(device)
        self.sentences.tower.to(device)
        return self

    def encode_images(self, images: Sequence[Image.Image]) -> Embeddings:
        """One unit row per picture, framed and on the encoder's ground.

        Raises: ImageError when a picture is transparent everywhere.
        """
        size, level = self.network.config.size, self.network.config.ground
        ground = (level, level, level)
        arrays = [pictures.to_array(pictures.on_ground(pictures.frame(image, size), ground)) for image in images]
        return self.encode_arrays(np.stack(arrays) if arrays else np.empty((0, size, size, 3), np.uint8))

    def encode_arrays(self, arrays: UInt8[np.ndarray, "queries height width 3"]) -> Embeddings:
        """One unit row per framed picture on its ground."""
        device = self.network.text_head.weight.device

        def embed(rows: UInt8[np.ndarray, "queries height width 3"]) -> Tensor:
            return self.network.embed_images(pictures.pixels_from_uint8(rows).to(device))

        return in_fixed_batches(embed, arrays, self.dim)

    def encode_texts(self, texts: Sequence[str]) -> Embeddings:
        """One unit row per text.

        Raises: UsageError when a text is empty, too long, or holds no known word.
        """
        with torch.inference_mode():
            rows = [self.network.embed_texts(self.sentences.encode([text])) for text in texts]
        return torch.cat(rows).cpu().numpy() if rows else np.empty((0, self.dim), np.float32)

    def _fingerprint(self) -> str:
        cfg = self.network.config
        preprocessing = f"{pictures.FRAMING} {cfg.size} on {cfg.ground}; {self.sentences.tokenizer.to_str()}"
        weights = weights_digest(self.network.state_dict()), weights_digest(self.sentences.tower.state_dict())
        return hashlib.sha256("\n".join([*weights, preprocessing]).encode()).hexdigest()
