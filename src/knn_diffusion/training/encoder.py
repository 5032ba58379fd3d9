"""Training of the joint encoder: each picture is told from all captions that are not true of it, and finds the same thing
drawn by another hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from knn_diffusion.checkpoint import CONFIG_FILE, apply_weights, read_facts
from knn_diffusion.config import config, require, to_dict
from knn_diffusion.device import choose_device, own_defaults
from knn_diffusion.model_folder import BUNDLES, resolve_model
from knn_diffusion.models.efficientnet import load_backbone
from knn_diffusion.models.encoders import TEXT_FOLDER, load_sticker_encoder, save_encoder
from knn_diffusion.models.sticker_encoder import StickerEncoder, StickerEncoderConfig, StickerJointEncoder
from knn_diffusion.models.text_tower import SentenceEncoder, open_text_tower
from knn_diffusion.randomness import derive_seed
from knn_diffusion.training.captioned_pictures import CaptionedPictures, captioned_pictures
from knn_diffusion.training.captions import read_captioned
from knn_diffusion.training.data import Batch, keep_pictures
from knn_diffusion.training.encoder_validation import EncoderValidation, validation_of
from knn_diffusion.training.loop import TrainingResult, check_output, train
from knn_diffusion.training.objective import Phase, Validation
from knn_diffusion.training.options import RunOptions
from knn_diffusion.training.plan import TrainingConfig
from knn_diffusion.training.processes import refuse_many
from knn_diffusion.training.views import ViewConfig

BUNDLED_TEXT_TOWER = BUNDLES / "stickers" / "encoder" / TEXT_FOLDER
TEXT_GAIN = 3.0
"""First weights of the text head over those of unit vectors; larger ones learn more slowly than the image tower."""
SCALE_SPEED = 10.0
"""The inverse temperature's logarithm learns so many times as fast as a weight."""


@config
class ContrastConfig:
    """What the encoder is pulled towards."""

    pool: int = 4096
    """Captions that a picture's own is told from, in each step."""
    found_weight: float = 0.5
    """Weight of finding a caption's picture in the batch, beside that of finding a picture's caption in the pool."""
    family_weight: float = 0.5
    """Weight of finding the same thing of another family in the batch."""
    sentence_noise: float = 0.3
    """Length of the random vector added to each unit sentence vector, so that near meanings stay near."""
    first_scale: float = 14.0
    """Inverse temperature at the start; it is learned (Radford et al. 2021)."""
    max_scale: float = 60.0
    """The inverse temperature never rises above."""

    def __post_init__(self) -> None:
        require(self.pool >= 1, "pool", self.pool, "at least 1")
        for name in ("found_weight", "family_weight", "sentence_noise"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require(0 < self.first_scale <= self.max_scale, "first_scale", self.first_scale, "in (0, max_scale]")


def encoder_training(num_steps: int = 2600) -> TrainingConfig:
    """The bundled encoder's run: 2,600 steps of 40 pairs, about 45 minutes on one CPU core with bfloat16 arithmetic."""
    return TrainingConfig(
        num_steps=num_steps,
        batch_size=40,
        learning_rate=4e-4,
        final_learning_rate=8e-6,
        warmup_steps=60,
        betas=(0.9, 0.99),
        weight_decay=0.02,
        clip_norm=10.0,
        ema_decay=0.99,
        log_every=25,
        validate_every=250,
        checkpoint_every=250,
    )


@config
class EncoderRun:
    """Everything that defines a training of the encoder; the defaults make the bundled one."""

    encoder: StickerEncoderConfig = field(default_factory=StickerEncoderConfig)
    """Shape of both sides."""
    losses: ContrastConfig = field(default_factory=ContrastConfig)
    """What it is pulled towards."""
    view: ViewConfig = field(default_factory=ViewConfig)
    """How pictures are varied."""
    training: TrainingConfig = field(default_factory=encoder_training)
    """How long and how fast."""
    captions_from_names: bool = False
    """Whether folders without captions.jsonl give the names of their files as captions."""
    backbone: str | None = None
    """Folder of the first weights of the convolutional network (recipes/backbone.py); None for random ones."""
    text_tower: str | None = None
    """Folder of the frozen text tower, as saved by this package or as published; None for the bundled one."""


class EncoderObjective:
    """The contrastive losses over one `StickerEncoder`; the temperature lives only here."""

    def __init__(
        self,
        run: EncoderRun,
        network: StickerEncoder,
        sentences: SentenceEncoder,
        validation: EncoderValidation,
        name: str = "stickers",
    ) -> None:
        self.run, self.sentences, self.validation, self.name = run, sentences, validation, name
        everything = to_dict(run)
        del everything["text_tower"], everything["backbone"]  # places on this machine
        self.settings: Mapping[str, object] = everything
        self.encoder = network
        self.temperature = _Temperature(run.losses.first_scale, run.losses.max_scale)
        self.network: nn.Module = network
        self.modules: nn.Module = nn.ModuleDict({"network": network, "temperature": self.temperature})

    def phases(self) -> list[Phase]:
        """One phase over everything."""
        return [Phase("encoder", list(self.modules.parameters()), self._loss)]

    def _loss(self, batch: Batch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        losses = self.run.losses
        pictures = self.encoder.embed_images(batch["pixels"])
        texts = self.encoder.embed_texts(_jittered(batch["sentences"], losses.sentence_noise, generator))
        scale = self.temperature()
        with torch.autocast(pictures.device.type, enabled=False):
            logits = scale * pictures @ texts.T  # 2 batch, pool
            named = chosen_loss(logits, batch["own"], batch["true"])
            found = chosen_loss(logits[:, batch["own"]].T, _diagonal(logits), batch["true"][:, batch["own"]].T)
            families = pairs_loss(scale * pictures @ pictures.T, batch["same"])
        return {
            "loss": named + losses.found_weight * found + losses.family_weight * families,
            "named": named,
            "found": found,
            "families": families,
            "scale": scale,
            "right": (logits.argmax(1) == batch["own"]).float().mean(),
        }

    def validate(self, network: nn.Module, step: int, generator: torch.Generator) -> Validation:
        """How often plain captions find pictures that were not trained on."""
        encoder = self._encoder(network)
        return Validation(metrics=self.validation.judge(encoder), preview=self.validation.preview(encoder))

    def export(self, network: nn.Module, folder: Path, facts: Mapping[str, object]) -> None:
        """Write the encoder with its text tower, ready for `load_encoder`."""
        encoder = self._encoder(network)
        encoder.facts = {"run": to_dict(self.run) | {"text_tower": None, "backbone": None}, **facts}
        save_encoder(encoder, folder)

    def _encoder(self, network: nn.Module) -> StickerJointEncoder:
        assert isinstance(network, StickerEncoder)
        return StickerJointEncoder(network, self.sentences, self.name)


@own_defaults()
def train_encoder(
    run: EncoderRun,
    sources: Sequence[str | Path],
    options: RunOptions,
    *,
    init: str | Path | None = None,
) -> TrainingResult:
    """Train an encoder on captioned pictures; leaves it in `output`/model.

    Framed pictures and sentence vectors are kept in `output`/cache.

    Args:
        sources: folders with captions.jsonl.
        init: folder of an encoder, or bundled name or folder of a model with one, whose weights start the run.
    Raises: UsageError when a source has no captions, or a resumed run was begun with other pictures; ImageError when a picture is
        unreadable; CheckpointError when `init` or the backbone is of another shape.
    """
    refuse_many("encoder", "loss compares all pictures of a batch")
    check_output(options.output, options.resume)
    sentences = open_text_tower(BUNDLED_TEXT_TOWER if run.text_tower is None else Path(run.text_tower))
    sentences.tower.to(choose_device(options.device))
    found = read_captioned(sources, from_names=run.captions_from_names)
    cfg = run.encoder
    pictures = captioned_pictures(
        found,
        sentences,
        options.output / "cache",
        size=cfg.size,
        ground=cfg.ground,
        pool=run.losses.pool,
        view=run.view,
        report=options.report,
    )
    keep_pictures(options.output, pictures.table.digest(), len(pictures))
    network = first_network(run, pictures, init)
    objective = EncoderObjective(run, network, sentences, validation_of(pictures, found))
    return train(objective, pictures, run.training, options)


def first_network(run: EncoderRun, pictures: CaptionedPictures, init: str | Path | None) -> StickerEncoder:
    """The network before its first step: that of `init`; else the backbone's weights, and a text head for these captions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(run.training.seed, "encoder weights"))
        network = StickerEncoder(run.encoder)
    if init is not None:
        trained = load_sticker_encoder(_encoder_in(init))
        apply_weights(network, trained.network.state_dict(), str(init))
        return network
    if run.backbone is not None:
        apply_weights(network.backbone, load_backbone(Path(run.backbone)).state_dict(), run.backbone)
    center_texts(network, torch.from_numpy(pictures.sentences.astype(np.float32)))
    return network


def _encoder_in(init: str | Path) -> Path:
    if "kind" in (read_facts(Path(init) / CONFIG_FILE) if (Path(init) / CONFIG_FILE).is_file() else {}):
        return Path(init)
    return resolve_model(init) / "encoder"


@torch.no_grad()
def center_texts(network: StickerEncoder, sentences: Float[Tensor, "texts text_width"]) -> None:
    """Let the text head read the sentences' principal components, half-whitened.

    So no trait that many captions share, such as naming an animal, drowns the others.
    """
    center = sentences.double().mean(0)
    values, vectors = torch.linalg.eigh((sentences.double() - center).T @ (sentences.double() - center))
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    dim = min(network.config.dim, len(values))
    weight = (vectors[:, :dim] * (values[:dim] + 1e-3 * values.mean()) ** -0.25).T
    length = ((sentences.double() - center) @ weight.T).norm(dim=1).mean()
    network.text_center.copy_(center)
    network.text_head.weight.zero_()
    network.text_head.weight[:dim].copy_(weight * (TEXT_GAIN / length))


def chosen_loss(
    logits: Float[Tensor, "batch pool"], chosen: Int[Tensor, "batch"], true: Bool[Tensor, "batch pool"]
) -> Float[Tensor, ""]:
    """Cross-entropy of the chosen candidate, in nats; others that are true too are neither pulled nor pushed."""
    others = true.clone()
    others[torch.arange(len(chosen), device=chosen.device), chosen] = False
    return F.cross_entropy(logits.masked_fill(others, -torch.inf), chosen)


def pairs_loss(logits: Float[Tensor, "batch batch"], same: Bool[Tensor, "batch batch"]) -> Float[Tensor, ""]:
    """Cross-entropy of each picture's partner, half a batch away, among pictures that show something else."""
    half = len(logits) // 2
    partner = torch.arange(len(logits), device=logits.device).roll(half)
    return chosen_loss(logits, partner, same)


def _diagonal(logits: Float[Tensor, "batch pool"]) -> Int[Tensor, "batch"]:
    return torch.arange(len(logits), device=logits.device)


class _Temperature(nn.Module):
    """The learned inverse temperature, kept as its logarithm."""

    def __init__(self, first: float, largest: float) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(first) / SCALE_SPEED))
        self.largest = largest

    def forward(self) -> Float[Tensor, ""]:
        return (self.log_scale * SCALE_SPEED).exp().clamp_max(self.largest)


def _jittered(
    sentences: Float[Tensor, "batch text_width"], length: float, generator: torch.Generator
) -> Float[Tensor, "batch text_width"]:
    """Unit sentence vectors, each moved by a random vector of that expected length and brought back to the sphere."""
    noise = torch.randn(sentences.shape, generator=generator, device=sentences.device, dtype=sentences.dtype)
    return F.normalize(sentences + noise * (length / math.sqrt(sentences.shape[1])), dim=-1)
