"""Image tokenizer: a VQGAN turns an image into a grid of codes and back (Sec. 3.2; Esser et al. 2021).

    pixels ──Encoder──▶ latents ──Quantizer──▶ codes ──Decoder──▶ pixels

Encoding is always the nearest code, so that an image has one set of tokens. [MASK] is no code; it belongs to the diffusion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from knn_diffusion.config import config, require
from knn_diffusion.models.tokenizer_protocol import Pixels, check_pixels, check_tokens
from knn_diffusion.shapes import Tokens

FeatureMap = Float[Tensor, "batch channels rows columns"]


@config
class TokenizerConfig:
    """Size of a tokenizer.

    image_size           side of the square image in pixels
    alpha                whether images have alpha as a fourth channel
    grid                 side of the token grid; image_size is `patch` times a power of two times this
    vocab_size           number of codes, V
    code_dim             width of a code; small (4 … 32) keeps the codes in use
    patch                side of the squares of pixels that the first and the last layer work on, 1 for none
    channels             channels at the finest of the inner resolutions
    channel_multipliers  channels at each inner resolution, finest first, as multiples of `channels`; each further one halves
    encoder_blocks       residual blocks at each resolution of the encoder
    decoder_blocks       residual blocks at each resolution of the decoder
    attention            whether encoder and decoder attend over the whole grid
    codebook_decay       share of a code's running mean that is kept at each training step, 0 … 1
    restart_share        a code used less than this share of the fair 1/V is given up and restarted, 0 … 1
    """

    image_size: int = 64
    grid: int = 16
    vocab_size: int = 1024
    code_dim: int = 16
    patch: int = 2
    channels: int = 64
    channel_multipliers: tuple[int, ...] = (1, 2)
    encoder_blocks: int = 1
    decoder_blocks: int = 2
    attention: bool = False
    codebook_decay: float = 0.98
    restart_share: float = 0.1
    alpha: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "grid", "code_dim", "patch", "channels", "encoder_blocks", "decoder_blocks"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.vocab_size >= 2, "vocab_size", self.vocab_size, "at least 2")
        require(self.channels % 8 == 0, "channels", self.channels, "a multiple of 8")
        require(
            len(self.channel_multipliers) >= 1 and min(self.channel_multipliers) >= 1,
            "channel_multipliers",
            self.channel_multipliers,
            "one or more positive integers",
        )
        factor = self.patch * 2 ** (len(self.channel_multipliers) - 1)
        require(
            self.image_size == self.grid * factor,
            "image_size",
            self.image_size,
            f"grid × {factor} = {self.grid * factor}",
        )
        limit = self.image_channels * self.cell**2
        require(
            self.code_dim <= limit,
            "code_dim",
            self.code_dim,
            f"at most the {limit} numbers of a {self.cell}-pixel cell",
        )
        require(0 <= self.codebook_decay < 1, "codebook_decay", self.codebook_decay, "in [0, 1)")
        require(0 <= self.restart_share < 1, "restart_share", self.restart_share, "in [0, 1)")

    @property
    def image_channels(self) -> int:
        """Channels of the image: 4 with alpha, else 3."""
        return 4 if self.alpha else 3

    @property
    def cell(self) -> int:
        """Side in pixels of the square that one token stands for."""
        return self.image_size // self.grid


SMALL = TokenizerConfig()
"""The bundled one: 64-pixel images, 16×16 tokens of 1,024 codes; trains on one CPU core."""

MEDIUM = TokenizerConfig(
    image_size=128, grid=16, channels=64, channel_multipliers=(1, 2, 4), attention=True, decoder_blocks=2
)
"""128-pixel images, 16×16 tokens of 1,024 codes; for one GPU."""

PAPER = TokenizerConfig(
    image_size=256,
    grid=32,
    vocab_size=2887,
    code_dim=32,
    patch=1,
    channels=128,
    channel_multipliers=(1, 1, 2, 4),
    encoder_blocks=2,
    decoder_blocks=3,
    attention=True,
)
"""The size of the paper's tokenizer: 256 pixels, 32×32 tokens, 2,887 codes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconstruction:
    """What a training step needs: the image drawn again, its tokens, and what quantizing cost."""

    pixels: Pixels
    tokens: Tokens
    commitment: Float[Tensor, ""]


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions beside an identity; the block starts as that identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm_1 = nn.GroupNorm(channels // 8, channels)
        self.conv_1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm_2 = nn.GroupNorm(channels // 8, channels)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)

    @property
    def last(self) -> nn.Module:
        """What starts at zero."""
        return self.conv_2

    def forward(self, x: FeatureMap) -> FeatureMap:
        """The features, corrected."""
        h = self.conv_1(functional.silu(self.norm_1(x)))
        return x + self.conv_2(functional.silu(self.norm_2(h)))


class AttentionBlock(nn.Module):
    """Self-attention over all cells of the grid, beside an identity as which it starts."""

    def __init__(self, channels: int, head_width: int = 64) -> None:
        super().__init__()
        self.heads = max(1, channels // head_width)
        self.norm = nn.GroupNorm(channels // 8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    @property
    def last(self) -> nn.Module:
        """What starts at zero."""
        return self.out

    def forward(self, x: FeatureMap) -> FeatureMap:
        """The features, each cell informed of all others."""
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (three h c) y x -> three b h (y x) c", three=3, h=self.heads)
        attended = functional.scaled_dot_product_attention(q, k, v)
        return x + self.out(rearrange(attended, "b h (y x) c -> b (h c) y x", y=x.shape[2]))


class Encoder(nn.Module):
    """Pixels to one vector of `code_dim` numbers for each cell of the grid: a linear shortcut and what the layers add.

    The shortcut starts as the cell's cosine transform and the layers at zero, so that training starts from k-means on
    patches instead of from noise (the idea of DC-AE's residual autoencoding, Chen et al. 2025).
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in config.channel_multipliers]
        kernel = 3 if config.patch == 1 else 2 * config.patch
        padding = (kernel - config.patch + 1) // 2
        layers: list[nn.Module] = [
            nn.Conv2d(config.image_channels, widths[0], kernel, stride=config.patch, padding=padding)
        ]
        for level, width in enumerate(widths):
            if level:
                layers.append(nn.Conv2d(widths[level - 1], width, 2, stride=2))
            layers += [ResidualBlock(width) for _ in range(config.encoder_blocks)]
        if config.attention:
            layers += [AttentionBlock(widths[-1]), ResidualBlock(widths[-1])]
        layers += [nn.GroupNorm(widths[-1] // 8, widths[-1]), nn.Conv2d(widths[-1], config.code_dim, 1, bias=False)]
        self.layers = nn.Sequential(*layers)
        self.shortcut = nn.Conv2d(config.image_channels, config.code_dim, config.cell, stride=config.cell)
        _start(self, cosine_filters(config.code_dim, config.cell, config.image_channels))

    def forward(self, pixels: Pixels) -> FeatureMap:
        """The latents, [batch, code_dim, grid, grid]."""
        return self.shortcut(pixels) + self.layers(pixels)


class Decoder(nn.Module):
    """Codes, looked up, to pixels: the inverse of the encoder's shortcut and what the layers add.

    Enlarging is by sub-pixel layers, so that the work is done at low resolution.
    """

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        widths = [config.channels * m for m in reversed(config.channel_multipliers)]
        layers: list[nn.Module] = [nn.Conv2d(config.code_dim, widths[0], 3, padding=1)]
        if config.attention:
            layers += [ResidualBlock(widths[0]), AttentionBlock(widths[0])]
        for level, width in enumerate(widths):
            if level:
                layers.append(nn.ConvTranspose2d(widths[level - 1], width, 2, stride=2))
            layers += [ResidualBlock(width) for _ in range(config.decoder_blocks)]
        layers += [nn.GroupNorm(widths[-1] // 8, widths[-1]), nn.SiLU()]
        fine = max(16, widths[-1] // config.patch**2)
        if config.patch > 1:
            layers += [
                nn.Conv2d(widths[-1], fine * config.patch**2, 3, padding=1),
                nn.PixelShuffle(config.patch),
                nn.SiLU(),
            ]
        layers.append(nn.Conv2d(fine if config.patch > 1 else widths[-1], config.image_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)
        self.shortcut = nn.ConvTranspose2d(config.code_dim, config.image_channels, config.cell, stride=config.cell)
        _start(self, cosine_filters(config.code_dim, config.cell, config.image_channels))

    def forward(self, codes: FeatureMap) -> Pixels:
        """The image, not clamped."""
        return self.shortcut(codes) + self.layers(codes)


def cosine_filters(count: int, size: int, channels: int = 3) -> Float[Tensor, "count channels size size"]:
    """Return the first orthonormal filters of an image's cosine transform, coarse before fine, light and alpha before colour."""
    place, frequency = (torch.arange(size) + 0.5) * math.pi / size, torch.arange(size)
    waves = functional.normalize(torch.cos(frequency[:, None] * place), dim=1)
    colors = functional.pad(torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]]), (0, channels - 3, 0, channels - 3))
    colors[3:, 3:] = 1
    colors = functional.normalize(colors, dim=1)
    filters = torch.einsum("kc,uy,vx->kuvcyx", colors, waves, waves).flatten(0, 2)
    importance = torch.tensor([1.0, 4, 4, 1][:channels])
    order = torch.einsum("k,uv->kuv", importance, (frequency[:, None] + frequency + 1.0).square())
    return filters[order.flatten().argsort(stable=True)[:count]]


def _start(network: Encoder | Decoder, shortcut: Tensor) -> None:
    """Begin as the cosine transform: layers keep variance, blocks are identities, what the layers add is zero."""
    for layer in network.layers.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            inputs = layer.weight[0].numel() if isinstance(layer, nn.Conv2d) else layer.weight.shape[0]
            nn.init.normal_(layer.weight, std=inputs**-0.5)
    blocks = [layer for layer in network.layers if isinstance(layer, ResidualBlock | AttentionBlock)]
    for layer in (*(block.last for block in blocks), network.layers[-1], network.shortcut):
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
    with torch.no_grad():
        network.shortcut.weight.copy_(shortcut)


class Quantizer(nn.Module):
    """Nearest of V codes, each the running mean of the vectors it stands for (van den Oord et al. 2017, app. A.1).

    Usage stays above 90 % because no code is left behind: one whose running share of all vectors falls below
    `restart_share` / V is restarted, that is, placed on a vector of the current batch, drawn with probability in
    proportion to its squared distance from its code (as k-means++ seeds), and given the fair share 1/V to prove
    itself. The same rule draws the first codes from the first batch. Narrow codes (`code_dim`) help as well.

    Differs from the paper: its tokenizer is a GumbelVQ, which ended with 2,887 of 8,192 codes in use.
    """

    codes: Float[Tensor, "vocab code_dim"]
    share: Float[Tensor, "vocab"]

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.decay = config.codebook_decay
        self.restart_share = config.restart_share
        self.register_buffer("codes", torch.randn(config.vocab_size, config.code_dim))
        self.register_buffer("share", torch.zeros(config.vocab_size))

    def nearest(self, vectors: Float[Tensor, "vectors code_dim"]) -> Int[Tensor, "vectors"]:
        """Index of the code at the smallest Euclidean distance from each vector, in float32 whatever surrounds it."""
        with torch.autocast(vectors.device.type, enabled=False):
            return (vectors.float() @ self.codes.T - 0.5 * self.codes.square().sum(1)).argmax(1)

    @torch.no_grad()
    def update(
        self, vectors: Float[Tensor, "vectors code_dim"], chosen: Int[Tensor, "vectors"], generator: torch.Generator
    ) -> None:
        """Move each code to the running mean of its vectors, then restart those that are hardly used."""
        count = torch.bincount(chosen, minlength=len(self.codes)).to(vectors.dtype)
        total = torch.zeros_like(self.codes).index_add_(0, chosen, vectors)
        old, weight = self.decay * self.share, (1 - self.decay) / len(vectors)
        share = old + weight * count
        mean = (old[:, None] * self.codes + weight * total) / share.clamp_min(1e-12)[:, None]
        self.codes.copy_(torch.where(share[:, None] > 1e-12, mean, self.codes))
        self.share.copy_(share)
        self._restart(vectors, (vectors - self.codes[chosen]).square().sum(1), generator)

    def _restart(self, vectors: Tensor, error: Tensor, generator: torch.Generator) -> None:
        dead = (self.share * len(self.codes) < self.restart_share).nonzero()[:, 0]
        draws = torch.rand(len(vectors), generator=generator, device=generator.device).to(error.device)
        # the largest u^(1/error) are a draw without replacement in proportion to the error (Efraimidis, Spirakis 2006)
        order = (draws.clamp_min(1e-30).log() / error.clamp_min(1e-8)).argsort(descending=True)[: len(dead)]
        dead = dead[: len(order)]
        self.codes[dead] = vectors[order]
        self.share[dead] = 1 / len(self.codes)

    def forward(
        self, latents: FeatureMap, generator: torch.Generator | None
    ) -> tuple[FeatureMap, Tokens, Float[Tensor, ""]]:
        """Quantized latents (gradient straight through), tokens, and the mean square that commits the encoder.

        The commitment is |z - sg(e)|², whose gradient reaches the encoder alone. The codes follow by their running
        means, so there is no second term whose weight could be mistaken for this one.
        """
        batch, _, rows, _ = latents.shape
        z = rearrange(latents, "b c y x -> (b y x) c").float()
        chosen = self.nearest(z.detach())
        picked = self.codes[chosen]
        if generator is not None:
            self.update(z.detach(), chosen, generator)
        commitment = (z - picked).square().mean()
        straight = z + (picked - z).detach()
        return rearrange(straight, "(b y x) c -> b c y x", b=batch, y=rows), chosen.view(batch, -1), commitment


class VQGAN(nn.Module):
    """An image tokenizer: `encode` and `decode` are deterministic inverses, as near as the codes allow."""

    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = Quantizer(config)
        self.decoder = Decoder(config)

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
        """True if its pixels have alpha as a fourth channel."""
        return self.config.alpha

    @property
    def codes(self) -> Float[Tensor, "vocab code_dim"]:
        """The vector of each code."""
        return self.quantizer.codes

    def forward(self, pixels: Pixels, generator: torch.Generator | None = None) -> Reconstruction:
        """Draw the images again through the codes; with a generator the codes learn from this batch.

        The pixels are neither clamped nor detached, for the losses of training.
        """
        quantized, tokens, commitment = self.quantizer(self.encoder(pixels), generator)
        return Reconstruction(pixels=self.decoder(quantized), tokens=tokens, commitment=commitment)

    @torch.no_grad()
    def encode(self, pixels: Pixels) -> Tokens:
        """Tokens of images in [-1, 1], grid rows first: always the nearest code, never a draw.

        Raises: UsageError when the images are not of the tokenizer's size.
        """
        check_pixels(pixels, self.config.image_size, self.config.image_channels)
        z = rearrange(self.encoder(pixels), "b c y x -> (b y x) c").float()
        return self.quantizer.nearest(z).view(len(pixels), -1)

    @torch.no_grad()
    def decode(self, tokens: Tokens) -> Pixels:
        """Images in [-1, 1] of grids of tokens.

        Raises: UsageError when the grid has another size or a token is none of the codes (as [MASK] is).
        """
        check_tokens(tokens, self.grid, self.vocab_size)
        codes = rearrange(self.codes[tokens], "b (y x) c -> b c y x", y=self.grid)
        return self.decoder(codes).float().clamp(-1, 1)


def codebook_perplexity(counts: Float[Tensor, "vocab"]) -> float:
    """How many equally used codes would carry as much: exp of the entropy of the use counts, 1 … V."""
    share = counts.double() / counts.sum()
    return math.exp(float(torch.special.entr(share).sum()))
