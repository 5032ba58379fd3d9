"""Training of the small joint encoder: contrastive against frozen sentences, and redrawing so that looks survive.

The figures it is judged by: the right picture for a concept's name, for everyday words that no caption uses, and how
much of a picture's thumbnail a linear map can read back from its vector (the probe), also for concepts new to the probe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn

from knn_diffusion import images, stickers
from knn_diffusion.checkpoint import apply_weights
from knn_diffusion.config import config, require, to_dict
from knn_diffusion.device import choose_device
from knn_diffusion.model_folder import BUNDLES, resolve_model
from knn_diffusion.models.encoders import TEXT_FOLDER, SmallJointEncoder, load_small_encoder, save_encoder
from knn_diffusion.models.small_encoder import (
    Painter,
    SmallEncoder,
    SmallEncoderConfig,
    contrastive_loss,
    looks_loss,
    meaning_loss,
)  # fmt: skip
from knn_diffusion.models.text_tower import SentenceEncoder, open_text_tower
from knn_diffusion.randomness import derive_seed
from knn_diffusion.stickers.dataset import NamedGlyphs
from knn_diffusion.training.captioned import folder_pairs, sticker_pairs
from knn_diffusion.training.data import Batch, Reporter
from knn_diffusion.training.loop import Phase, Progress, TrainingConfig, TrainingResult, Validation, train

BUNDLED_TEXT_TOWER = BUNDLES / "stickers" / "encoder" / TEXT_FOLDER
PROBE_SIDE = 8
PROBE_RIDGE = 1e-3
NEAREST = 5
PREVIEW_WORDS = 8


@config
class EncoderLossConfig:
    """What the encoder is pulled towards."""

    meaning_weight: float = 0.0
    """Weight of lying where the caption lies, beside the contrastive loss; finds words that no caption used."""
    looks_weight: float = 4.0
    """Weight of redrawing the thumbnail beside the contrastive loss; 0 forgets what pictures look like."""
    thumbnail: int = 32
    """Side of the thumbnail in pixels; divides the input's side."""
    sentence_noise: float = 0.3
    """Length of the random vector added to each unit sentence vector, so that near meanings stay near."""
    first_scale: float = 14.3
    """Inverse temperature at the start; it is learned (Radford et al. 2021: 1 / 0.07)."""
    max_scale: float = 100.0
    """The inverse temperature never rises above."""

    def __post_init__(self) -> None:
        for name in ("meaning_weight", "looks_weight", "sentence_noise"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require(0 < self.first_scale <= self.max_scale, "first_scale", self.first_scale, "in (0, max_scale]")


def small_training(num_steps: int = 2500) -> TrainingConfig:
    """The bundled encoder's run: 2,500 steps of 256 pictures, about 30 minutes on one CPU core with bfloat16 arithmetic."""
    return TrainingConfig(
        num_steps=num_steps,
        batch_size=256,
        learning_rate=1e-3,
        final_learning_rate=1e-5,
        warmup_steps=100,
        betas=(0.9, 0.98),
        weight_decay=0.05,
        ema_decay=0.995,
        log_every=10,
        validate_every=250,
        checkpoint_every=250,
    )


@config
class EncoderRun:
    """Everything that defines a training of the joint encoder; the defaults make the bundled one."""

    encoder: SmallEncoderConfig = field(default_factory=SmallEncoderConfig)
    """Shape of both towers."""
    losses: EncoderLossConfig = field(default_factory=EncoderLossConfig)
    """What it is pulled towards."""
    training: TrainingConfig = field(default_factory=small_training)
    """How long and how fast."""
    scenes: int = 24_000
    """Sticker scenes to draw where no captioned pictures are given."""
    captions_each: int = 3
    """Wordings of each scene, one of which is drawn each time it is seen."""
    text_tower: str | None = None
    """Folder of the frozen text tower, as saved by this package or as published; None for the bundled one."""

    def __post_init__(self) -> None:
        require(self.scenes >= 1, "scenes", self.scenes, "at least 1")
        require(self.captions_each >= 1, "captions_each", self.captions_each, "at least 1")
        divides = self.encoder.size % self.losses.thumbnail == 0
        require(divides, "losses.thumbnail", self.losses.thumbnail, f"a divisor of encoder.size {self.encoder.size}")
        require(self.encoder.size % PROBE_SIDE == 0, "encoder.size", self.encoder.size, f"a multiple of {PROBE_SIDE}")


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderBenchmark:
    """Pictures and words the encoder never trains on.

    gallery: one picture of each concept; names: what it shows; probe: random scenes for the probe, the first half of
    them of other concepts than the second half.
    """

    gallery: UInt8[np.ndarray, "items height width 3"]
    names: Sequence[str]
    queries: Sequence[str]
    everyday: Mapping[str, Sequence[str]]
    probe: UInt8[np.ndarray, "images height width 3"]


def sticker_benchmark(
    size: int, glyphs: NamedGlyphs | None = None, probe_count: int = 3000, seed: int = 77
) -> EncoderBenchmark:
    """Fresh renders of every concept that is no flat sign, on every background colour in turn."""
    every = [concept for concept in stickers.concepts(glyphs) if not concept.flat]
    scenes = [
        stickers.one_object_scene(concept, stickers.COLOURS[i % len(stickers.COLOURS)], seed + i)
        for i, concept in enumerate(every)
    ]
    halves = every[::2], every[1::2]
    probe = [stickers.sample_scene(seed * 10_007 + i, halves[i * 2 // probe_count], "all") for i in range(probe_count)]
    names = {concept.name for concept in every}
    return EncoderBenchmark(
        gallery=stickers.render_array(scenes, size, glyphs),
        names=[concept.name for concept in every],
        queries=[concept.phrase for concept in every],
        everyday={word: means for word, means in stickers.everyday_words().items() if not names.isdisjoint(means)},
        probe=stickers.render_array(probe, size, glyphs),
    )


class EncoderObjective:
    """Contrastive and looks loss over one `SmallEncoder`; the painter and the temperature live only here."""

    def __init__(
        self, run: EncoderRun, sentences: SentenceEncoder, benchmark: EncoderBenchmark, name: str = "stickers"
    ) -> None:
        self.run, self.losses, self.sentences, self.benchmark, self.name = run, run.losses, sentences, benchmark, name
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(run.training.seed, "encoder weights"))
            self.small = SmallEncoder(run.encoder)
            self.painter = Painter(run.encoder.dim, run.losses.thumbnail)
        self.temperature = _Temperature(run.losses.first_scale, run.losses.max_scale)
        self.network: nn.Module = self.small
        self.modules: nn.Module = nn.ModuleDict(
            {"network": self.small, "painter": self.painter, "temperature": self.temperature}
        )

    def phases(self) -> list[Phase]:
        """One phase over everything."""
        return [Phase("encoder", list(self.modules.parameters()), self._loss)]

    def _loss(self, batch: Batch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        sentences = _jittered(batch["sentences"], self.losses.sentence_noise, generator)
        pictures = self.small.embed_images(batch["pixels"])
        texts = self.small.embed_texts(sentences)
        scale = self.temperature()
        with torch.autocast(pictures.device.type, enabled=False):
            contrast = contrastive_loss(pictures, texts, scale, batch["also_true"])
            meaning = meaning_loss(pictures, texts[: len(pictures)])
        thumbnail = F.avg_pool2d(batch["pixels"], batch["pixels"].shape[-1] // self.losses.thumbnail)
        looks = looks_loss(self.painter(pictures), thumbnail)
        return {
            "loss": contrast + self.losses.meaning_weight * meaning + self.losses.looks_weight * looks,
            "contrast": contrast,
            "meaning": meaning,
            "looks": looks,
            "scale": scale,
            "right": ((pictures @ texts.T).argmax(1) == torch.arange(len(pictures), device=texts.device))
            .float()
            .mean(),
        }

    def validate(self, network: nn.Module, step: int, generator: torch.Generator) -> Validation:
        """Top-1 and top-5 by name, top-5 by everyday word, the probe's R²; the preview shows the nearest pictures."""
        encoder = self._encoder(network)
        gallery = encoder.encode_arrays(self.benchmark.gallery)
        order = np.argsort(-encoder.encode_texts(self.benchmark.queries) @ gallery.T, axis=1)[:, :NEAREST]
        own = order == np.arange(len(order))[:, None]
        metrics = {"name_top1": float(own[:, 0].mean()), "name_top5": float(own.any(1).mean())}
        words = list(self.benchmark.everyday)
        nearest = np.argsort(-encoder.encode_texts(words) @ gallery.T, axis=1)[:, :NEAREST]
        right = [
            any(self.benchmark.names[i] in self.benchmark.everyday[word] for i in row)
            for word, row in zip(words, nearest, strict=True)
        ]
        if words:
            metrics["everyday_top5"] = float(np.mean(right))
        metrics |= looks_probe(encoder.encode_arrays(self.benchmark.probe), self.benchmark.probe)
        return Validation(metrics=metrics, preview=self._preview(words, nearest))

    def export(self, network: nn.Module, folder: Path, facts: Mapping[str, object]) -> None:
        """Write the encoder with its text tower, ready for `load_encoder`."""
        encoder = self._encoder(network)
        encoder.facts = {"run": to_dict(self.run), **facts}
        save_encoder(encoder, folder)

    def _encoder(self, network: nn.Module) -> SmallJointEncoder:
        assert isinstance(network, SmallEncoder)
        return SmallJointEncoder(network, self.sentences, self.name)

    def _preview(self, words: Sequence[str], nearest: np.ndarray) -> Image.Image | None:
        shown = range(0, len(words), max(1, len(words) // PREVIEW_WORDS))
        pictures = [Image.fromarray(self.benchmark.gallery[i]) for row in shown for i in nearest[row]]
        labels = [words[row] if rank == 0 else "" for row in shown for rank in range(nearest.shape[1])]
        return images.grid(pictures, nearest.shape[1], 96, labels) if pictures else None


def train_encoder(
    run: EncoderRun,
    sources: Sequence[str | Path],
    output: Path,
    *,
    init: str | Path | None = None,
    resume: bool = False,
    max_minutes: float | None = None,
    device: str = "auto",
    report: Reporter | None = None,
    watch: Callable[[Progress], None] | None = None,
) -> TrainingResult:
    """Train a joint encoder on captioned pictures; leaves it in `output`/model.

    Pixels and sentence vectors are kept in `output`/cache. On one CPU core they take about 5 minutes for the preset.

    Args:
        sources: folders with captions.jsonl; without any, sticker scenes are drawn.
        init: bundled name or folder of a model whose encoder's weights start the run.
    Raises: UsageError when a source has no captions; CheckpointError when `init` is of another shape or the text tower is
        missing; MissingDependencyError when the emoji font is missing.
    """
    size, seed = run.encoder.size, run.training.seed
    sentences = open_text_tower(BUNDLED_TEXT_TOWER if run.text_tower is None else Path(run.text_tower))
    sentences.tower.to(choose_device(device))
    cache = output / "cache"
    if sources:
        pairs = folder_pairs(sources, sentences, cache, size=size, report=report)
    else:
        each = run.captions_each
        pairs = sticker_pairs(
            sentences, cache, count=run.scenes, seed=seed, size=size, captions_each=each, report=report
        )
    objective = EncoderObjective(run, sentences, sticker_benchmark(size))
    if init is not None:
        trained = load_small_encoder(resolve_model(init) / "encoder")
        apply_weights(objective.small, trained.network.state_dict(), str(init))
    return train(
        objective, pairs, run.training, output, resume=resume, max_minutes=max_minutes, device=device, watch=watch
    )


class _Temperature(nn.Module):
    """The learned inverse temperature, kept as its logarithm."""

    def __init__(self, first: float, largest: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(first)))
        self.largest = largest

    def forward(self) -> Float[Tensor, ""]:
        return self.log_scale.exp().clamp_max(self.largest)


def looks_probe(
    vectors: Float[np.ndarray, "items dim"], pixels: UInt8[np.ndarray, "items height width 3"]
) -> dict[str, float]:
    """How much of an 8×8 thumbnail's variance a ridge regression reads from the vectors, R² in (-∞, 1].

    Returns: `looks_r2`, fitted and judged on alternating pictures; `looks_r2_new`, fitted on the first half and judged on
    the second, which shows other concepts.
    """
    step = pixels.shape[1] // PROBE_SIDE
    small = pixels.reshape(len(pixels), PROBE_SIDE, step, PROBE_SIDE, step, 3).mean((2, 4), dtype=np.float32)
    target = small.reshape(len(pixels), -1) / 255
    middle = len(pixels) // 2
    return {
        "looks_r2": _ridge_r2(vectors[::2], target[::2], vectors[1::2], target[1::2]),
        "looks_r2_new": _ridge_r2(vectors[:middle], target[:middle], vectors[middle:], target[middle:]),
    }


def _ridge_r2(x: np.ndarray, y: np.ndarray, x_new: np.ndarray, y_new: np.ndarray) -> float:
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y, x_new = (x - x_mean).astype(np.float64), (y - y_mean).astype(np.float64), x_new - x_mean
    gram = x.T @ x
    weights = np.linalg.solve(gram + PROBE_RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)), x.T @ y)
    residual = np.square(x_new @ weights - (y_new - y_mean)).sum()
    return float(1 - residual / np.square(y_new - y_new.mean(0)).sum())


def _jittered(
    sentences: Float[Tensor, "batch text_width"], length: float, generator: torch.Generator
) -> Float[Tensor, "batch text_width"]:
    """Unit sentence vectors, each moved by a random vector of that expected length and brought back to the sphere."""
    noise = torch.randn(sentences.shape, generator=generator, device=sentences.device, dtype=sentences.dtype)
    return F.normalize(sentences + noise * (length / math.sqrt(sentences.shape[1])), dim=-1)
