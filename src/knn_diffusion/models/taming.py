"""The image tokenizers of taming-transformers as they are: VQGAN and GumbelVQ (Esser et al. 2021).

    pixels ──encoder──▶ quant_conv ──quantize──▶ codes ──post_quant_conv──▶ decoder ──▶ pixels

Parts are called as in taming's checkpoints, so that the published names are the names of our weights. Latent diffusion's
VQ models, VQ-Diffusion's codecs, LlamaGen's tokenizers (Sun et al. 2024) and IBQ (Shi et al. 2024) are the same network.

Differs from taming: a GumbelVQ takes its most probable code; the original draws one even when it encodes, so that an image
has other tokens each time.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from knn_diffusion.config import config, require
from knn_diffusion.models.tokenizer_protocol import Pixels, check_pixels, check_tokens
from knn_diffusion.shapes import Tokens

FeatureMap = Float[Tensor, "batch channels rows columns"]
NextMap = Float[Tensor, "batch channels_out rows_out columns_out"]
"""What a block makes of a feature map."""

GROUPS = 32
"""Groups of every norm, whatever the width."""
MOST_LEVELS = 12
"""Resolutions; published tokenizers have four or five."""


@config
class TamingConfig:
    """Size of a tokenizer; the defaults are the OpenImages f8 GumbelVQ that VQ-Diffusion draws with.

    image_size           side of the square image in pixels; the network would take others
    vocab_size           number of codes, V
    code_dim             width of a code
    latent_dim           width between the 1 × 1 convolutions around the codes and the encoder or decoder
    channels             channels at the full resolution, a multiple of 32
    channel_multipliers  channels at each resolution, finest first, as multiples of `channels`; each further one halves
    blocks               residual blocks at each resolution of the encoder; the decoder has one more
    attention_levels     resolutions, counted from 0 as the finest, with attention after every block
    quantizer            how a code is chosen: the nearest (VQGAN), by inner product (IBQ), by logits of a convolution (GumbelVQ)
    """

    image_size: int = 256
    vocab_size: int = 8192
    code_dim: int = 256
    latent_dim: int = 256
    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 4)
    blocks: int = 2
    attention_levels: tuple[int, ...] = (3,)
    quantizer: Literal["nearest", "product", "gumbel"] = "gumbel"

    def __post_init__(self) -> None:
        for name in ("code_dim", "latent_dim", "blocks"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.vocab_size >= 2, "vocab_size", self.vocab_size, "at least 2")
        fits = self.channels >= GROUPS and self.channels % GROUPS == 0
        require(fits, "channels", self.channels, f"a multiple of {GROUPS}")
        multipliers = self.channel_multipliers
        fits = 1 <= len(multipliers) <= MOST_LEVELS and min(multipliers) >= 1
        require(fits, "channel_multipliers", multipliers, f"one to {MOST_LEVELS} positive integers")
        fits = set(self.attention_levels) <= set(range(len(multipliers)))
        require(fits, "attention_levels", self.attention_levels, f"numbers from 0 to {len(multipliers) - 1}")
        cell = self.cell
        fits = self.image_size >= cell and self.image_size % cell == 0
        require(fits, "image_size", self.image_size, f"a multiple of {cell}, the side of a token")

    @property
    def cell(self) -> int:
        """Side in pixels of the square that one token stands for: 8 or 16, the f8 and f16 of the names."""
        return 2 ** (len(self.channel_multipliers) - 1)

    @property
    def grid(self) -> int:
        """Side of the token grid."""
        return self.image_size // self.cell

    @property
    def widths(self) -> list[int]:
        """Channels at each resolution, finest first."""
        return [self.channels * multiplier for multiplier in self.channel_multipliers]


def norm(width: int) -> nn.GroupNorm:
    """The norm before every convolution."""
    return nn.GroupNorm(GROUPS, width, eps=1e-6)


class ResidualBlock(nn.Module):
    """Norm, SiLU and 3×3 convolution, twice; a new width enters by a 1×1 shortcut."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(width_in), nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2, self.conv2 = norm(width), nn.Conv2d(width, width, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width_in, width, 1) if width_in != width else None

    def forward(self, x: FeatureMap) -> NextMap:
        """The features, changed a little."""
        h = self.conv1(functional.silu(self.norm1(x)))
        h = self.conv2(functional.silu(self.norm2(h)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttentionBlock(nn.Module):
    """Self-attention of one head over all places."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: FeatureMap) -> FeatureMap:
        """The features, each place informed of all others."""
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c y x -> b 1 (y x) c") for layer in (self.q, self.k, self.v))
        attended = functional.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(attended, "b 1 (y x) c -> b c y x", y=x.shape[2]))


class Downsample(nn.Module):
    """Half the resolution by a 3×3 convolution, padded on the right and below only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: FeatureMap) -> NextMap:
        """The features at half the resolution."""
        return self.conv(functional.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Twice the resolution by nearest neighbors, then a 3×3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: FeatureMap) -> NextMap:
        """The features at twice the resolution."""
        return self.conv(functional.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, attention after each where there is any, then the way to the next resolution."""

    def __init__(self, width_in: int, width: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResidualBlock(width if number else width_in, width) for number in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(width) for _ in range(blocks if attention else 0))
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None

    def forward(self, x: FeatureMap) -> NextMap:
        """The features of the next resolution."""
        for number, block in enumerate(self.block):
            x = block(x)
            if self.attn:
                x = self.attn[number](x)
        resample = self.downsample or self.upsample
        return x if resample is None else resample(x)


class Middle(nn.Module):
    """Two blocks around attention at the resolution of the tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = (
            ResidualBlock(width, width),
            AttentionBlock(width),
            ResidualBlock(width, width),
        )

    def forward(self, x: FeatureMap) -> FeatureMap:
        """The features, changed a little."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Pixels to one latent for each token."""

    def __init__(self, config: TamingConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        for number, width in enumerate(widths):
            level = Level(widths[max(0, number - 1)], width, config.blocks, number in config.attention_levels)
            level.downsample = Downsample(width) if number + 1 < len(widths) else None
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = norm(widths[-1]), nn.Conv2d(widths[-1], config.latent_dim, 3, padding=1)

    def forward(self, pixels: Pixels) -> FeatureMap:
        """The latents, [batch, latent_dim, grid, grid]."""
        x = self.conv_in(pixels)
        for level in self.down:
            x = level(x)
        return self.conv_out(functional.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """One latent for each token to pixels; `up` counts from the finest resolution, as the encoder's `down` does."""

    def __init__(self, config: TamingConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = nn.Conv2d(config.latent_dim, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList()
        for number, (width, coarser) in enumerate(zip(widths, widths[1:] + widths[-1:], strict=True)):
            level = Level(coarser, width, config.blocks + 1, number in config.attention_levels)
            level.upsample = Upsample(width) if number else None
            self.up.append(level)
        self.norm_out, self.conv_out = norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, latents: FeatureMap) -> Pixels:
        """The image, not clamped."""
        x = self.mid(self.conv_in(latents))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(functional.silu(self.norm_out(x)))


class TableQuantizer(nn.Module):
    """Of each latent the code at the smallest Euclidean distance, or that with the largest inner product."""

    def __init__(self, config: TamingConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.code_dim)
        self.by_distance = config.quantizer == "nearest"

    @property
    def codes(self) -> Float[Tensor, "vocab code_dim"]:
        """The vector of each code."""
        return self.embedding.weight

    def forward(self, latents: FeatureMap) -> Tokens:
        """The tokens, grid rows first."""
        products = rearrange(latents, "b c y x -> b (y x) c") @ self.codes.T
        return (products - 0.5 * self.codes.square().sum(1) if self.by_distance else products).argmax(-1)


class GumbelQuantizer(nn.Module):
    """Of each latent the code with the largest logit."""

    def __init__(self, config: TamingConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.code_dim, config.vocab_size, 1)
        self.embed = nn.Embedding(config.vocab_size, config.code_dim)

    @property
    def codes(self) -> Float[Tensor, "vocab code_dim"]:
        """The vector of each code."""
        return self.embed.weight

    def forward(self, latents: FeatureMap) -> Tokens:
        """The tokens, grid rows first."""
        return self.proj(latents).flatten(2).argmax(1)


class TamingTokenizer(nn.Module):
    """A tokenizer of taming's; `encode` and `decode` are deterministic."""

    def __init__(self, config: TamingConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = GumbelQuantizer(config) if config.quantizer == "gumbel" else TableQuantizer(config)
        self.quant_conv = nn.Conv2d(config.latent_dim, config.code_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.code_dim, config.latent_dim, 1)

    @property
    def vocab_size(self) -> int:
        """Number of codes, V."""
        return self.config.vocab_size

    @property
    def grid(self) -> int:
        """Side of the token grid."""
        return self.config.grid

    @property
    def alpha(self) -> bool:
        """Always false."""
        return False

    @property
    def codes(self) -> Float[Tensor, "vocab code_dim"]:
        """The vector of each code."""
        return self.quantize.codes

    @torch.no_grad()
    def encode(self, pixels: Pixels) -> Tokens:
        """Tokens of images in [-1, 1], grid rows first: always the same for an image.

        Raises: UsageError when the images are not of the tokenizer's size.
        """
        check_pixels(pixels, self.config.image_size)
        latents = self.quant_conv(self.encoder(pixels))
        with torch.autocast(pixels.device.type, enabled=False):
            return self.quantize(latents.float())

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> Pixels:
        """Images in [-1, 1] of grids of tokens.

        Raises: UsageError when the grid has another size or a token is none of the codes (as [MASK] is).
        """
        check_tokens(tokens, self.grid, self.vocab_size)
        codes = rearrange(self.codes[tokens], "b (y x) c -> b c y x", y=self.grid)
        return self.decoder(self.post_quant_conv(codes)).float().clamp(-1, 1)
