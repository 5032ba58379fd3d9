"""A complete model folder and pictures to retrieve, made of random parts in a second: for tests of what stands on them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from knn_diffusion.checkpoint import save_part
from knn_diffusion.config import to_dict
from knn_diffusion.diffusion.plan import SamplerConfig
from knn_diffusion.diffusion.process import Schedule
from knn_diffusion.image_index import ImageIndex
from knn_diffusion.images import save_png
from knn_diffusion.model_folder import write_pipeline_file
from knn_diffusion.models.denoiser import Denoiser, DenoiserConfig
from knn_diffusion.models.encoders import SmallJointEncoder, load_encoder, save_encoder
from knn_diffusion.models.small_encoder import SmallEncoder, SmallEncoderConfig
from knn_diffusion.models.text_tower import SentenceEncoder, TextTower, TextTowerConfig
from knn_diffusion.models.tokenizer import VQGAN, TokenizerConfig

SIZE, GRID, VOCAB, DIM, STEPS = 16, 4, 16, 8, 8
WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "red",
    "green",
    "blue",
    "heart",
    "square",
    "circle",
    "hat",
    "cat",
    "with",
)
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 220), "yellow": (230, 210, 40)}


def draw_pictures(folder: Path) -> Path:
    """Twelve small pictures: three shapes in four colours, one PNG file each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (colour, rgb) in enumerate(COLOURS.items()):
        for shape in ("circle", "square", "bar"):
            image = Image.new("RGB", (24, 24), (255 - 60 * number, 240, 60 * number))
            pen = ImageDraw.Draw(image)
            if shape == "circle":
                pen.ellipse((4, 4, 19, 19), fill=rgb)
            else:
                pen.rectangle((4, 4, 19, 19) if shape == "square" else (2, 10, 21, 13), fill=rgb)
            save_png(image, folder / f"{colour}-{shape}.png")
    return folder


def tiny_encoder(seed: int = 0, name: str = "tiny") -> SmallJointEncoder:
    """A joint encoder with random weights; another seed gives another fingerprint."""
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = TextTowerConfig(
            vocab_size=len(WORDS), width=16, num_layers=1, num_heads=2, hidden_width=16, max_tokens=12
        )
        sentences = SentenceEncoder(TextTower(shape), words)
        small = SmallEncoderConfig(size=SIZE, dim=DIM, text_width=16, stem_width=8, widths=(8, 8), blocks=(1, 1))
        return SmallJointEncoder(SmallEncoder(small), sentences, name)


GRIDS = {"patch_size": 2, "local_width": 8, "local_blocks": 1, "grid_neighbors": 3, "grid_layers": 1}
"""Options of a denoiser that reads its neighbors' tokens."""


def build_model(folder: Path, pictures: Path | None = None, seed: int = 0, **options: int) -> Path:
    """A model folder with all parts; with pictures also an index of them. Options are the denoiser's."""
    save_encoder(tiny_encoder(seed), folder / "encoder")
    encoder = load_encoder(folder / "encoder")  # rests rounded, so only the saved one has the final fingerprint
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = VQGAN(
            TokenizerConfig(image_size=SIZE, grid=GRID, vocab_size=VOCAB, code_dim=4, channels=8, decoder_blocks=1)
        )
        config = replace(
            DenoiserConfig(
                vocab_size=VOCAB,
                grid=GRID,
                width=16,
                depth=1,
                heads=2,
                condition_dim=DIM,
                num_steps=STEPS,
                step_width=8,
            ),
            **options,  # type: ignore[arg-type]
        )
        denoiser = Denoiser(config)
        # A fresh network predicts nearly the same whatever it is told; here the condition shall matter.
        denoiser.head.weight.data.mul_(20)
        for block in denoiser.blocks:
            block.cross_attention.output.weight.data.mul_(20)
    save_part(folder / "tokenizer", kind="tokenizer", config=tokenizer.config, weights=tokenizer.state_dict())
    schedule = Schedule(num_steps=STEPS, vocab_size=VOCAB, preset="absorbing")
    facts = {"encoder": encoder.fingerprint, "schedule": to_dict(schedule)}
    save_part(folder / "denoiser", kind="denoiser", config=config, weights=denoiser.state_dict(), extra=facts)
    sampler = SamplerConfig(num_steps=4, order="halton", guidance_scale=2.0)
    write_pipeline_file(folder, name="tiny", sampler=sampler, k=3, facts={"data": "random", "license": "mit"})
    if pictures is not None:
        ImageIndex.build([pictures], folder / "index", encoder).close()
    return folder


def same_pixels(one: Image.Image, other: Image.Image) -> bool:
    """Whether two pictures are equal in every pixel."""
    return np.array_equal(np.asarray(one), np.asarray(other))


class TransparentTokenizer:
    """A tokenizer whose drawings have alpha: 1 in the middle, 0 in a frame of two pixels."""

    alpha = True

    def __init__(self, tokenizer: Any) -> None:
        self._opaque = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opaque, name)

    def __deepcopy__(self, memo: Any) -> TransparentTokenizer:
        return self

    def to(self, device: torch.device) -> TransparentTokenizer:
        return self

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        pixels = self._opaque.decode(tokens)
        alpha = torch.full_like(pixels[:, :1], -1)
        alpha[..., 2:-2, 2:-2] = 1
        return torch.cat([pixels * (alpha + 1) / 2, alpha], dim=1)
