"""The small joint text-image encoder of the first bundled model: a convolutional tower, and a light head on a frozen sentence encoder.

It is read, no longer trained; `models.sticker_encoder` took its place. Its space carries looks as well as meaning: the second half of a
vector holds the picture's principal components.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from knn_diffusion.config import config, require

STEM_STRIDE = 2
HALF = math.sqrt(0.5)
SHARPNESS = 12.0
"""Weight of a caption's cosine in the softmax of `CaptionMemory`; chosen with NEAREST on names and sticker prompts."""
NEAREST = 5


@config
class SmallEncoderConfig:
    """Shape of both towers; the defaults are the bundled encoder (2.9 million parameters, 106 MFLOP an image)."""

    size: int = 64
    """Side of the square input in pixels; divisible by 2 at the stem and at every stage."""
    dim: int = 256
    """Width of the joint space H."""
    looks: int = 0
    """How many coordinates of H, the last ones, are the thumbnail's principal components, see `Looks`; 0 before the fit."""
    looks_side: int = 16
    """Side of the thumbnail whose components these are; divides `size` where there are any."""
    text_width: int = 384
    """Length of the sentence vectors that the text head reads."""
    anchors: int = 0
    """Plain captions that the text side remembers with where their pictures lie, see `CaptionMemory`; 0 before the fit."""
    stem_width: int = 32
    """Channels after the first convolution."""
    widths: tuple[int, ...] = (64, 128, 256)
    """Channels of each stage; a stage begins by halving the side."""
    blocks: tuple[int, ...] = (1, 1, 2)
    """Residual blocks of each stage."""
    squeeze: float = 0.5
    """Channels inside a residual block over those outside, in (0, 4]."""

    def __post_init__(self) -> None:
        for name in ("size", "dim", "text_width", "stem_width", "looks_side"):
            require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        require(self.anchors >= 0, "anchors", self.anchors, "at least 0")
        most = min(self.dim - 1, 3 * self.looks_side**2)
        require(0 <= self.looks <= most, "looks", self.looks, f"from 0 to {most}")
        fits = self.looks == 0 or self.size % self.looks_side == 0
        require(fits, "looks_side", self.looks_side, f"a divisor of size {self.size}")
        require(len(self.widths) > 0, "widths", self.widths, "at least one stage")
        require(len(self.blocks) == len(self.widths), "blocks", self.blocks, f"as long as widths {self.widths}")
        require(self.size % self.stride == 0, "size", self.size, f"a multiple of {self.stride}")
        require(0 < self.squeeze <= 4, "squeeze", self.squeeze, "in (0, 4]")

    @property
    def meaning(self) -> int:
        """Coordinates of H that the tower gives, the first ones; the others are looks."""
        return self.dim - self.looks

    @property
    def stride(self) -> int:
        """Pixels of one cell of the last feature map."""
        return STEM_STRIDE * 2 ** len(self.widths)


class _ChannelNorm(nn.Module):
    """Layer norm over the channels of a feature map; in channels-last memory a plain layer norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class _Block(nn.Module):
    """Pre-norm residual block of two 3×3 convolutions with a squeeze between them."""

    def __init__(self, width: int, squeeze: float) -> None:
        super().__init__()
        inner = max(1, round(width * squeeze))
        self.body = nn.Sequential(
            _ChannelNorm(width),
            nn.SiLU(),
            nn.Conv2d(width, inner, 3, padding=1),
            _ChannelNorm(inner),
            nn.SiLU(),
            nn.Conv2d(inner, width, 3, padding=1),
        )

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        return x + self.body(x)


class ImageTower(nn.Module):
    """Pixels to one unit vector, all of H or its first part. The last map is flattened, not pooled: where things are is
    part of the looks.
    """

    def __init__(self, cfg: SmallEncoderConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, cfg.stem_width, 3, STEM_STRIDE, 1)]
        width = cfg.stem_width
        for stage_width, count in zip(cfg.widths, cfg.blocks, strict=True):
            layers += [_ChannelNorm(width), nn.Conv2d(width, stage_width, 3, 2, 1)]
            layers += [_Block(stage_width, cfg.squeeze) for _ in range(count)]
            width = stage_width
        self.body = nn.Sequential(*layers, _ChannelNorm(width), nn.SiLU())
        self.head = nn.Linear(width * (cfg.size // cfg.stride) ** 2, cfg.meaning)
        for parameter in self.body.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch meaning"]:
        """Unit vectors of images in [-1, 1], float32."""
        features = self.body(pixels.contiguous(memory_format=torch.channels_last))  # [batch, channels, 4, 4]
        vectors = self.head(features.flatten(1)).float()
        return F.normalize(vectors, dim=-1)


class Looks(nn.Module):
    """The thumbnail's principal components as a unit vector (eigenpictures: Sirovich and Kirby 1987), nearly whitened.

    A linear map reads the picture back from them, whether or not anything like it was seen before: with 256 components
    of 16 × 16 pixels a judge names 98 % of unseen concepts in what a ridge regression redraws, with the tower's 256
    coordinates 58 % (docs/log.md).
    """

    def __init__(self, cfg: SmallEncoderConfig) -> None:
        super().__init__()
        self.side = cfg.looks_side
        self.register_buffer("center", torch.zeros(3 * self.side**2))
        self.register_buffer("project", torch.zeros(cfg.looks, 3 * self.side**2))
        self.center: Tensor
        self.project: Tensor

    def thumbnails(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch colours"]:
        """Pixels averaged down to side × side, one row each."""
        return F.avg_pool2d(pixels.float(), pixels.shape[-1] // self.side).flatten(1)

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch looks"]:
        """Unit vectors of images in [-1, 1], float32."""
        with torch.autocast(pixels.device.type, enabled=False):
            return F.normalize((self.thumbnails(pixels) - self.center) @ self.project.T, dim=-1)


class CaptionMemory(nn.Module):
    """Where the pictures of known plain captions lie, looked up by what a text means (Nadaraya and Watson, 1964).

    A text is compared with the remembered captions in a space of half-whitened sentence vectors, and gets the weighted
    mean of the places of its nearest ones: "puppy" lands among the dogs although no caption has the word. Of the looks
    nothing is remembered.
    """

    def __init__(self, cfg: SmallEncoderConfig) -> None:
        super().__init__()
        width = cfg.text_width // 2
        self.register_buffer("center", torch.zeros(cfg.text_width))
        self.register_buffer("project", torch.zeros(width, cfg.text_width))
        self.register_buffer("keys", torch.zeros(cfg.anchors, width))
        self.register_buffer("places", torch.zeros(cfg.anchors, cfg.dim))
        self.center: Tensor
        self.project: Tensor
        self.keys: Tensor
        self.places: Tensor

    def compared(self, sentences: Float[Tensor, "batch text_width"]) -> Float[Tensor, "batch width"]:
        """Unit vectors whose cosines say how much alike two texts are."""
        return F.normalize((sentences - self.center) @ self.project.T, dim=-1)

    def forward(self, sentences: Float[Tensor, "batch text_width"]) -> Float[Tensor, "batch dim"]:
        """Mean place of the pictures of the nearest captions, relative to the mean of all pictures."""
        likeness = SHARPNESS * self.compared(sentences) @ self.keys.T
        best, rows = likeness.topk(min(NEAREST, likeness.shape[1]), dim=1)
        return torch.einsum("bk,bkd->bd", best.softmax(1), self.places[rows])


class SmallEncoder(nn.Module):
    """Image tower, looks, and text head with its memory of captions."""

    def __init__(self, cfg: SmallEncoderConfig) -> None:
        super().__init__()
        self.config = cfg
        self.image_tower = ImageTower(cfg)
        self.looks = Looks(cfg) if cfg.looks else None
        self.text_head = nn.Linear(cfg.text_width, cfg.dim)
        self.memory = CaptionMemory(cfg) if cfg.anchors else None
        nn.init.orthogonal_(self.text_head.weight)
        nn.init.zeros_(self.text_head.bias)

    def embed_images(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit vectors of images in [-1, 1], float32; meaning and looks weigh the same."""
        meaning = self.image_tower(pixels)
        return meaning if self.looks is None else torch.cat([meaning, self.looks(pixels)], dim=-1) * HALF

    def embed_texts(self, sentences: Float[Tensor, "batch text_width"]) -> Float[Tensor, "batch dim"]:
        """Unit vectors of texts from their frozen sentence vectors, float32."""
        vectors = self.text_head(sentences).float()
        if self.memory is not None:
            vectors = vectors + self.memory(sentences.float())
        return F.normalize(vectors, dim=-1)
