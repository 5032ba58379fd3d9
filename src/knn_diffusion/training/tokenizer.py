"""Training of the image tokenizer: draw the image again through few codes, and fool a discriminator (VQGAN).

Two phases a step: the generator minimises pixel, perceptual, commitment and adversarial terms; the discriminator learns to
tell images from reconstructions. It begins before the generator listens to it, so that its first opinions are informed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, nn
from torch.nn import functional

from knn_diffusion.checkpoint import CONFIG_FILE, apply_weights, read_facts, save_part
from knn_diffusion.config import config, require, to_dict
from knn_diffusion.device import own_defaults
from knn_diffusion.errors import UsageError
from knn_diffusion.images import from_array, grid, over_ground, pixels_from_uint8, uint8_from_pixels
from knn_diffusion.model_folder import resolve_model
from knn_diffusion.models.discriminator import PatchDiscriminator
from knn_diffusion.models.efficientnet import EfficientNet, load_backbone
from knn_diffusion.models.tokenizer import VQGAN, TokenizerConfig, codebook_perplexity
from knn_diffusion.models.tokenizers import load_tokenizer
from knn_diffusion.randomness import rand
from knn_diffusion.training.data import Batch, PixelDataset, keep_pictures, load_pixels
from knn_diffusion.training.loop import TrainingResult, check_output, train
from knn_diffusion.training.objective import Phase, Validation
from knn_diffusion.training.options import RunOptions
from knn_diffusion.training.perceptual import PERCEPTIONS, FeaturePerception, PerceptualName
from knn_diffusion.training.plan import TrainingConfig
from knn_diffusion.training.processes import refuse_many

PREVIEWS = 8


@config
class TokenizerLossConfig:
    """What the tokenizer is pulled towards, beside the mean absolute difference of pixels (weight 1).

    perceptual           what compares images beyond pixels: none, edges (a gradient pyramid) or random (fixed random features)
    perceptual_weight    its weight
    backbone_weight      weight of the distance between features of a pretrained backbone, which `train_tokenizer` is then given
    alpha_weight         weight of the mean absolute difference of alpha, where images have it
    commitment_weight    pull of the encoder towards its codes
    adversarial_weight   weight of fooling the discriminator
    feature_weight       weight of matching the discriminator's features
    discriminator_start  step at which the discriminator begins to learn
    adversarial_start    step at which the generator begins to listen to it
    """

    perceptual: PerceptualName = "edges"
    perceptual_weight: float = 0.5
    backbone_weight: float = 0.0
    alpha_weight: float = 0.5
    commitment_weight: float = 2.0
    adversarial_weight: float = 0.02
    feature_weight: float = 0.2
    discriminator_start: int = 2000
    adversarial_start: int = 2500

    def __post_init__(self) -> None:
        weights = ("perceptual", "backbone", "alpha", "commitment", "adversarial", "feature")
        for name in (f"{weight}_weight" for weight in weights):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        ordered = 0 <= self.discriminator_start <= self.adversarial_start
        require(
            ordered, "adversarial_start", self.adversarial_start, "at least discriminator_start, which is at least 0"
        )


@config
class TokenizerRun:
    """Everything that decides how a tokenizer turns out, but its data."""

    tokenizer: TokenizerConfig
    training: TrainingConfig
    loss: TokenizerLossConfig = TokenizerLossConfig()
    decoder_only: bool = False
    """True to train the decoder alone, from `init`: tokens stay what they are, so that a trained denoiser stays valid."""


class TokenizerObjective:
    """VQGAN's two losses; an `Objective` of the training loop."""

    def __init__(
        self,
        run: TokenizerRun,
        validation: UInt8[np.ndarray, "items height width channels"],
        backbone: EfficientNet | None = None,
    ) -> None:
        self.run = run
        self.settings: Mapping[str, object] = to_dict(run)
        self.batch_size = run.training.batch_size
        self.validation = validation
        self.tokenizer = VQGAN(run.tokenizer)
        self.discriminator = PatchDiscriminator()
        self.perceive = PERCEPTIONS[run.loss.perceptual]()
        self.backbone = FeaturePerception(backbone) if backbone is not None and run.loss.backbone_weight > 0 else None
        self.network: nn.Module = self.tokenizer
        parts = {"tokenizer": self.tokenizer, "discriminator": self.discriminator, "perceive": self.perceive}
        self.modules: nn.Module = nn.ModuleDict(parts).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.tokenizer.encoder.requires_grad_(not run.decoder_only)
        self._seen: tuple[Tensor, Tensor] | None = None

    def phases(self) -> list[Phase]:
        """The generator, then the discriminator on what the generator just drew."""
        return [
            Phase("tokenizer", [one for one in self.tokenizer.parameters() if one.requires_grad], self.generator_loss),
            Phase("discriminator", list(self.discriminator.parameters()), self.discriminator_loss),
        ]

    def generator_loss(self, batch: Batch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Pixels, edges, commitment and, from `adversarial_start`, the discriminator's opinion.

        Images with alpha are compared over a random ground, another one for each image and step: so colours count where
        they are seen, and alpha everywhere.
        """
        s, real = self.run.loss, batch["pixels"].contiguous(memory_format=torch.channels_last)
        result = self.tokenizer(real, None if self.run.decoder_only else generator)
        redrawn = result.pixels.float()
        ground = 2 * rand(len(real), 3, 1, 1, generator=generator).to(real) - 1
        drawn, real_seen = over_ground(redrawn, ground), over_ground(real, ground)
        self._seen = real_seen, drawn.detach()
        pixel, perceptual = (drawn - real_seen).abs().mean(), self.perceive(drawn, real_seen)
        loss = pixel + s.perceptual_weight * perceptual
        if not self.run.decoder_only:
            loss = loss + s.commitment_weight * result.commitment
        parts = {"pixel": pixel, "perceptual": perceptual, "commitment": result.commitment}
        if self.run.tokenizer.alpha:
            parts["alpha"] = (redrawn[:, 3:] - real[:, 3:]).abs().mean()
            loss = loss + s.alpha_weight * parts["alpha"]
        if self.backbone is not None:
            parts["backbone"] = self.backbone(drawn, real_seen)
            loss = loss + s.backbone_weight * parts["backbone"]
        if step >= s.adversarial_start and s.adversarial_weight + s.feature_weight > 0:
            adversarial, features = self._opinion(drawn, real_seen)
            loss = loss + s.adversarial_weight * adversarial + s.feature_weight * features
            parts |= {"adversarial": adversarial, "features": features}
        return {"loss": loss, **parts}

    def _opinion(self, drawn: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Hinge loss of the generator, and the distance of the discriminator's features of both images."""
        self.discriminator.requires_grad_(False)
        logits, seen = self.discriminator(drawn)
        with torch.no_grad():
            _, wanted = self.discriminator(real)
        self.discriminator.requires_grad_(True)
        distances = [(a.float() - b.float()).abs().mean() for a, b in zip(seen, wanted, strict=True)]
        return -logits.float().mean(), torch.stack(distances).mean()

    def discriminator_loss(self, batch: Batch, step: int, generator: torch.Generator) -> dict[str, Tensor] | None:
        """Hinge loss: images above 1, reconstructions below -1."""
        s = self.run.loss
        if step < s.discriminator_start or s.adversarial_weight + s.feature_weight == 0 or self._seen is None:
            return None
        logits, _ = self.discriminator(torch.cat(self._seen))
        real, drawn = logits.float().chunk(2)
        return {
            "loss": functional.relu(1 - real).mean() + functional.relu(1 + drawn).mean(),
            "gap": (real.mean() - drawn.mean()),
        }

    def validate(self, network: nn.Module, step: int, generator: torch.Generator) -> Validation:
        """Quality of reconstructions, on white where they have alpha, and how much of the codebook they use."""
        device = next(network.parameters()).device
        assert isinstance(network, VQGAN)
        counts = torch.zeros(network.vocab_size)
        error, squared = 0.0, 0.0
        previews: list[np.ndarray] = []
        for start in range(0, len(self.validation), self.batch_size):
            pixels = pixels_from_uint8(self.validation[start : start + self.batch_size]).to(device)
            tokens = network.encode(pixels)
            white = torch.ones(len(pixels), 3, 1, 1, device=device)
            real, drawn = over_ground(pixels, white), over_ground(network.decode(tokens), white)
            counts += torch.bincount(tokens.flatten().cpu(), minlength=network.vocab_size)
            error += float((drawn - real).abs().sum())
            squared += float((drawn - real).square().sum())
            if not previews:
                previews = [*uint8_from_pixels(real[:PREVIEWS]), *uint8_from_pixels(drawn[:PREVIEWS])]
        values = 3 * self.validation[..., 0].size
        metrics = {
            "l1": error / values,
            "psnr": float(10 * np.log10(4 * values / squared)),
            "codebook_usage": float((counts > 0).float().mean()),
            "codebook_perplexity": codebook_perplexity(counts),
        }
        columns = min(PREVIEWS, len(self.validation))
        return Validation(
            metrics=metrics, preview=grid([from_array(one) for one in previews], columns=columns, cell=96)
        )

    def start_from(self, folder: Path) -> None:
        """Take the weights of a trained tokenizer of the same shape.

        Raises: CheckpointError when it is missing, damaged or of another shape.
        """
        trained, _ = load_tokenizer(folder)
        apply_weights(self.tokenizer, trained.state_dict(), str(folder))

    def export(self, network: nn.Module, folder: Path, facts: Mapping[str, object]) -> None:
        """Write the tokenizer in half precision."""
        assert isinstance(network, VQGAN)
        weights = {name: value.half() for name, value in network.state_dict().items()}
        save_part(
            folder, kind="tokenizer", config=network.config, weights=weights, extra={"run": to_dict(self.run), **facts}
        )


@own_defaults()
def train_tokenizer(
    run: TokenizerRun,
    sources: Sequence[str | Path],
    options: RunOptions,
    *,
    init: str | Path | None = None,
    backbone: Path | None = None,
) -> TrainingResult:
    """Train a tokenizer on image folders, files or shards; leaves it in `output/model`.

    Args:
        backbone: folder of a pretrained backbone, for `loss.backbone_weight`.
        init: folder of a tokenizer, or bundled name or folder of a model with one, whose weights start the run.

    Raises: UsageError when there are fewer than two readable images, or a resumed run was begun with others; CheckpointError when `init` is of another shape.
    """
    refuse_many("tokenizer", "codebook and discriminator look at whole batches")
    check_output(options.output, options.resume)
    if run.decoder_only and init is None:
        raise UsageError("expected a tokenizer whose decoder is trained alone, got none: name its model (--init)")
    cache = options.output / "cache"
    size, alpha = run.tokenizer.image_size, run.tokenizer.alpha
    found = load_pixels(sources, size, cache, options.report, options.notice, alpha=alpha)
    keep_pictures(options.output, found.digest, len(found.ids))
    pixels = found.array
    if len(pixels) < 2:
        raise UsageError(f"expected at least 2 images to train on, got {len(pixels)}: add images")
    cut = len(pixels) - min(512, max(1, len(pixels) // 50))
    objective = TokenizerObjective(run, pixels[cut:], _backbone(run, backbone))
    if init is not None:
        objective.start_from(_tokenizer_in(init))
    dataset = PixelDataset(pixels[:cut], mirror=True)
    return train(objective, dataset, run.training, options)


def _tokenizer_in(init: str | Path) -> Path:
    facts = Path(init) / CONFIG_FILE
    return Path(init) if facts.is_file() and "kind" in read_facts(facts) else resolve_model(init) / "tokenizer"


def _backbone(run: TokenizerRun, folder: Path | None) -> EfficientNet | None:
    if run.loss.backbone_weight == 0:
        return None
    if folder is None:
        raise UsageError(
            "expected a pretrained backbone, loss.backbone_weight is above 0 and none was given: name its folder "
            "(--backbone) or set loss.backbone_weight=0"
        )
    return load_backbone(folder)
