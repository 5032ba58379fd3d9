"""Training of the small joint encoder: contrastive against frozen sentences, redrawing so that looks survive, and at last
a text head fitted to where the pictures came to lie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from knn_diffusion.checkpoint import apply_weights
from knn_diffusion.config import config, require, to_dict
from knn_diffusion.device import choose_device, own_defaults
from knn_diffusion.model_folder import BUNDLES, resolve_model
from knn_diffusion.models.encoders import TEXT_FOLDER, SmallJointEncoder, load_small_encoder, save_encoder
from knn_diffusion.models.small_encoder import (
    Painter,
    SmallEncoder,
    SmallEncoderConfig,
    contrastive_loss,
    looks_loss,
)  # fmt: skip
from knn_diffusion.models.text_tower import SentenceEncoder, open_text_tower
from knn_diffusion.randomness import derive_seed
from knn_diffusion.training.captioned import CaptionedImages, folder_pairs, sticker_pairs
from knn_diffusion.training.closed_form import fitted
from knn_diffusion.training.data import Batch, keep_pictures
from knn_diffusion.training.encoder_benchmark import PROBE_SIDE, EncoderBenchmark, sticker_benchmark
from knn_diffusion.training.loop import TrainingResult, check_output, train
from knn_diffusion.training.objective import Phase, Validation
from knn_diffusion.training.options import RunOptions
from knn_diffusion.training.plan import TrainingConfig
from knn_diffusion.training.processes import refuse_many

BUNDLED_TEXT_TOWER = BUNDLES / "stickers" / "encoder" / TEXT_FOLDER


@config
class EncoderLossConfig:
    """What the encoder is pulled towards."""

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
        require(self.looks_weight >= 0, "looks_weight", self.looks_weight, "at least 0")
        require(self.sentence_noise >= 0, "sentence_noise", self.sentence_noise, "at least 0")
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
    looks: int = 256
    """Principal components of the thumbnail that are added to H when the steps are done; 0 for none."""
    captions_each: int = 4
    """Captions of each scene, the bare names first; one of them is drawn each time the scene is seen."""
    text_tower: str | None = None
    """Folder of the frozen text tower, as saved by this package or as published; None for the bundled one."""

    def __post_init__(self) -> None:
        require(self.scenes >= 1, "scenes", self.scenes, "at least 1")
        require(self.looks >= 0, "looks", self.looks, "at least 0")
        require(self.encoder.looks == 0, "encoder.looks", self.encoder.looks, "0, they are fitted afterwards (looks)")
        replace(
            self.encoder, dim=self.encoder.dim + self.looks, looks=self.looks
        )  # else it would fail when all is trained
        require(self.captions_each >= 1, "captions_each", self.captions_each, "at least 1")
        divides = self.encoder.size % self.losses.thumbnail == 0
        require(divides, "losses.thumbnail", self.losses.thumbnail, f"a divisor of encoder.size {self.encoder.size}")
        require(self.encoder.size % PROBE_SIDE == 0, "encoder.size", self.encoder.size, f"a multiple of {PROBE_SIDE}")


class EncoderObjective:
    """Contrastive and looks loss over one `SmallEncoder`; the painter and the temperature live only here."""

    def __init__(
        self, run: EncoderRun, sentences: SentenceEncoder, benchmark: EncoderBenchmark, name: str = "stickers"
    ) -> None:
        self.run, self.losses, self.sentences, self.benchmark, self.name = run, run.losses, sentences, benchmark, name
        everything = to_dict(run)
        del everything["text_tower"]  # a place on this machine
        self.settings: Mapping[str, object] = everything
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
        pictures = self.small.embed_images(batch["pixels"])
        texts = self.small.embed_texts(_jittered(batch["sentences"], self.losses.sentence_noise, generator))
        scale = self.temperature()
        with torch.autocast(pictures.device.type, enabled=False):
            contrast = contrastive_loss(pictures, texts, scale, batch["also_true"])
        thumbnail = F.avg_pool2d(batch["pixels"], batch["pixels"].shape[-1] // self.losses.thumbnail)
        looks = looks_loss(self.painter(pictures), thumbnail)
        return {
            "loss": contrast + self.losses.looks_weight * looks,
            "contrast": contrast,
            "looks": looks,
            "scale": scale,
            "right": ((pictures @ texts.T).argmax(1) == torch.arange(len(pictures), device=texts.device))
            .float()
            .mean(),
        }

    def validate(self, network: nn.Module, step: int, generator: torch.Generator) -> Validation:
        """The benchmark's figures and preview."""
        encoder = self._encoder(network)
        return Validation(metrics=self.benchmark.judge(encoder), preview=self.benchmark.preview(encoder))

    def export(self, network: nn.Module, folder: Path, facts: Mapping[str, object]) -> None:
        """Write the encoder with its text tower, ready for `load_encoder`."""
        encoder = self._encoder(network)
        encoder.facts = {"run": to_dict(self.run), **facts}
        save_encoder(encoder, folder)

    def _encoder(self, network: nn.Module) -> SmallJointEncoder:
        assert isinstance(network, SmallEncoder)
        return SmallJointEncoder(network, self.sentences, self.name)


@own_defaults()
def train_encoder(
    run: EncoderRun,
    sources: Sequence[str | Path],
    options: RunOptions,
    *,
    init: str | Path | None = None,
) -> TrainingResult:
    """Train a joint encoder on captioned pictures; leaves it in `output`/model.

    Pixels and sentence vectors are kept in `output`/cache. On one CPU core they take about 5 minutes for the preset.

    Args:
        sources: folders with captions.jsonl; without any, sticker scenes are drawn.
        init: bundled name or folder of a model whose encoder's weights start the run.
    Raises: UsageError when a source has no captions, or a resumed run was begun with other pictures; CheckpointError when `init` is of another shape or the text tower is
        missing; MissingDependencyError when the emoji font is missing.
    """
    refuse_many("encoder", "loss compares all pictures of a batch")
    check_output(options.output, options.resume)
    size, seed = run.encoder.size, run.training.seed
    sentences = open_text_tower(BUNDLED_TEXT_TOWER if run.text_tower is None else Path(run.text_tower))
    sentences.tower.to(choose_device(options.device))
    cache, report = options.output / "cache", options.report
    if sources:
        pairs = folder_pairs(sources, sentences, cache, size=size, report=report)
    else:
        each = run.captions_each
        pairs = sticker_pairs(
            sentences, cache, count=run.scenes, seed=seed, size=size, captions_each=each, report=report
        )
    keep_pictures(options.output, pairs.digest(), len(pairs))
    objective = EncoderObjective(run, sentences, sticker_benchmark(size))
    if init is not None:
        trained = load_small_encoder(resolve_model(init) / "encoder")
        apply_weights(objective.small.image_tower, trained.network.image_tower.state_dict(), str(init))
    result = train(objective, pairs, run.training, options)
    if not result.finished:
        return result
    model = options.output / "model"
    figures = finish_encoder(model, pairs, objective.benchmark, looks=run.looks, device=options.device)
    return replace(result, metrics=result.metrics | {f"fitted/{name}": value for name, value in figures.items()})


def finish_encoder(
    folder: Path, pairs: CaptionedImages, benchmark: EncoderBenchmark, *, looks: int, device: str = "auto"
) -> dict[str, float]:
    """Add the looks to a trained encoder and fit its text head to its images, in place; the image tower does not change.

    Returns: the benchmark's figures afterwards.
    """
    encoder = load_small_encoder(folder).to(choose_device(device))
    made = SmallJointEncoder(fitted(encoder.network, pairs, looks), encoder.sentences, encoder.name, encoder.facts)
    metrics = benchmark.judge(made)
    made.facts["metrics"] = metrics
    save_encoder(made, folder)
    return metrics


class _Temperature(nn.Module):
    """The learned inverse temperature, kept as its logarithm."""

    def __init__(self, first: float, largest: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(first)))
        self.largest = largest

    def forward(self) -> Float[Tensor, ""]:
        return self.log_scale.exp().clamp_max(self.largest)


def _jittered(
    sentences: Float[Tensor, "batch text_width"], length: float, generator: torch.Generator
) -> Float[Tensor, "batch text_width"]:
    """Unit sentence vectors, each moved by a random vector of that expected length and brought back to the sphere."""
    noise = torch.randn(sentences.shape, generator=generator, device=sentences.device, dtype=sentences.dtype)
    return F.normalize(sentences + noise * (length / math.sqrt(sentences.shape[1])), dim=-1)
