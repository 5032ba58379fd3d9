"""The seam between this package and any joint text-image encoder: one protocol, a registry, and the encoder of this package.

The small encoder here and real CLIP, SigLIP or SigLIP 2 (`transformers_encoder`) answer the same calls. A vector never
depends on what else was encoded with it: texts go one by one, images in batches of a fixed size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from knn_diffusion import images as pictures
from knn_diffusion.checkpoint import (
    CONFIG_FILE,
    apply_weights,
    atomic_folder,
    load_part,
    read_facts,
    save_part,
    weights_digest,
    write_json,
)
from knn_diffusion.config import read_mapping
from knn_diffusion.device import own_defaults
from knn_diffusion.errors import CheckpointError, UsageError
from knn_diffusion.hub import is_hub_id
from knn_diffusion.models.fixed_batches import in_fixed_batches
from knn_diffusion.models.small_encoder import SmallEncoder, SmallEncoderConfig
from knn_diffusion.models.sticker_encoder import StickerEncoder, StickerEncoderConfig, StickerJointEncoder
from knn_diffusion.models.text_tower import SentenceEncoder, load_text_tower, save_text_tower
from knn_diffusion.models.transformers_encoder import TransformersEncoder, fetch_encoder, load_transformers_encoder
from knn_diffusion.shapes import Embeddings

KIND = "small-encoder"
STICKER_KIND = "sticker-encoder"
TEXT_FOLDER = "text"
BUNDLES = Path(__file__).parent.parent / "bundles"


@runtime_checkable
class JointEncoder(Protocol):
    """Images and texts as unit vectors of one space H, where cosine ranks how well they fit."""

    @property
    def name(self) -> str:
        """How messages call it."""

    @property
    def dim(self) -> int:
        """Width of H."""

    @property
    def fingerprint(self) -> str:
        """Digest of weights and preprocessing, stored with every index and model made with it."""

    def encode_images(self, images: Sequence[Image.Image]) -> Embeddings:
        """One unit row per image, in RGB, or in RGBA where something shows through it."""

    def encode_texts(self, texts: Sequence[str]) -> Embeddings:
        """One unit row per text. Raises: UsageError when a text is empty or too long."""


class SmallJointEncoder:
    """The image tower and text head of this package over a frozen sentence encoder."""

    def __init__(
        self,
        network: SmallEncoder,
        sentences: SentenceEncoder,
        name: str = "small",
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

    def to(self, device: torch.device | str) -> SmallJointEncoder:
        """Work on that device; returns itself."""
        self.network.to(device)
        self.sentences.tower.to(device)
        return self

    @own_defaults()
    def encode_images(self, images: Sequence[Image.Image]) -> Embeddings:
        """One unit row per image, squared to the tower's input first; transparency lies on a ground that shows the picture."""
        size = self.network.config.size
        arrays = [pictures.to_array(pictures.square(image, size)) for image in images]
        return self.encode_arrays(np.stack(arrays) if arrays else np.empty((0, size, size, 3), np.uint8))

    @own_defaults()
    def encode_arrays(self, arrays: UInt8[np.ndarray, "queries height width 3"]) -> Embeddings:
        """One unit row per square of raw pixels that has the tower's size already."""
        device = self.network.text_head.weight.device

        def embed(rows: UInt8[np.ndarray, "queries height width 3"]) -> Tensor:
            return self.network.embed_images(pictures.pixels_from_uint8(rows).to(device))

        return in_fixed_batches(embed, arrays, self.dim)

    @own_defaults()
    def encode_texts(self, texts: Sequence[str]) -> Embeddings:
        """One unit row per text.

        Raises: UsageError when a text is empty, too long, or holds no known word.
        """
        with torch.inference_mode():
            rows = [self.network.embed_texts(self.sentences.encode([text])) for text in texts]
        return torch.cat(rows).cpu().numpy() if rows else np.empty((0, self.dim), np.float32)

    def _fingerprint(self) -> str:
        preprocessing = f"square {self.network.config.size}, [-1, 1]; {self.sentences.tokenizer.to_str()}"
        weights = weights_digest(self.network.state_dict()), weights_digest(self.sentences.tower.state_dict())
        return hashlib.sha256("\n".join([*weights, preprocessing]).encode()).hexdigest()


@own_defaults()
def load_encoder(name_or_dir: str | Path, *, network: bool = False, revision: str | None = None) -> JointEncoder:
    """The encoder of a registered name, of a folder, or of a repository `owner/name` on the Hugging Face hub.

    Args:
        network: whether a repository may be downloaded; otherwise it must lie in the hub's cache.
        revision: its branch, tag or commit.

    Raises: UsageError when there is no such encoder; CheckpointError when it is damaged; MissingDependencyError when it
        needs transformers and that is not installed; HubError when the hub does not have it or cannot be reached.
    """
    name = str(name_or_dir)
    if name in REGISTRY:
        return REGISTRY[name](network)
    folder = Path(name_or_dir)
    if not folder.is_dir():
        if not is_hub_id(name):
            known = ", ".join(REGISTRY)
            raise UsageError(
                f"expected an encoder ({known}), a folder or owner/name on the hub, got {name!r}: check the name"
            )
        folder = fetch_encoder(name, network=network, revision=revision)
    facts = read_facts(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    if "model_type" in facts:
        return load_transformers_encoder(folder, name)
    return load_small_encoder(folder) if facts.get("kind") == KIND else load_sticker_encoder(folder)


def load_small_encoder(folder: Path) -> SmallJointEncoder:
    """Read an encoder that `save_encoder` or the training wrote.

    Raises: CheckpointError when a part of it is missing, damaged or of another kind.
    """
    part = load_part(folder, kind=KIND, config_class=SmallEncoderConfig)
    network = SmallEncoder(part.config)
    apply_weights(network, part.weights, str(folder))
    facts = dict(part.extra)
    return SmallJointEncoder(network, load_text_tower(folder / TEXT_FOLDER), facts.pop("name", folder.name), facts)


def load_sticker_encoder(folder: Path) -> StickerJointEncoder:
    """Read a sticker encoder that `save_encoder` or the training wrote.

    Raises: CheckpointError when a part of it is missing, damaged or of another kind.
    """
    part = load_part(folder, kind=STICKER_KIND, config_class=StickerEncoderConfig)
    with torch.random.fork_rng(devices=[]):  # building draws first weights from the global generator
        network = StickerEncoder(part.config)
    apply_weights(network, part.weights, str(folder))
    facts = dict(part.extra)
    return StickerJointEncoder(network, load_text_tower(folder / TEXT_FOLDER), facts.pop("name", folder.name), facts)


def save_encoder(encoder: JointEncoder, folder: Path) -> None:
    """Write an encoder so that `load_encoder(folder)` gives one with the same fingerprint.

    Raises: UsageError when it is an encoder of another making.
    """
    if isinstance(encoder, StickerJointEncoder):
        weights = {name: value.half() for name, value in encoder.network.state_dict().items()}
        extra = {"name": encoder.name, **encoder.facts}
        with atomic_folder(folder) as temporary:
            save_part(temporary, kind=STICKER_KIND, config=encoder.network.config, weights=weights, extra=extra)
            save_text_tower(temporary / TEXT_FOLDER, encoder.sentences)
    elif isinstance(encoder, SmallJointEncoder):
        save_small_encoder(folder, encoder.network, encoder.sentences, {"name": encoder.name, **encoder.facts})
    elif isinstance(encoder, TransformersEncoder):
        with atomic_folder(folder) as temporary:
            for part in (encoder.model, encoder.image_processor, encoder.tokenizer):
                part.save_pretrained(temporary)
            stored = read_mapping(temporary / CONFIG_FILE) | {"weights_sha256": encoder.fingerprint}
            write_json(temporary / CONFIG_FILE, stored)
    else:
        raise UsageError(f"expected an encoder of this package to save, got {type(encoder).__name__}: save it yourself")


def save_small_encoder(
    folder: Path, network: SmallEncoder, sentences: SentenceEncoder, facts: Mapping[str, Any]
) -> None:
    """Write image tower and text head into `folder` in half precision, the frozen text tower into its own folder below."""
    weights = {name: value.half() for name, value in network.state_dict().items()}
    with atomic_folder(folder) as temporary:
        save_part(temporary, kind=KIND, config=network.config, weights=weights, extra=facts)
        save_text_tower(temporary / TEXT_FOLDER, sentences)


def _load_bundled(network: bool) -> JointEncoder:
    folder = BUNDLES / "stickers" / "encoder"
    if not folder.is_dir():
        raise CheckpointError(f"expected the bundled encoder in {folder}, found none: install the package again")
    return load_small_encoder(folder)


def _load_published(name: str) -> Callable[[bool], JointEncoder]:
    return lambda network: load_encoder(name, network=network)


REGISTRY: dict[str, Callable[[bool], JointEncoder]] = {
    "stickers": _load_bundled,
    "clip": _load_published("openai/clip-vit-base-patch32"),
    "siglip": _load_published("google/siglip-base-patch16-224"),
    "siglip2": _load_published("google/siglip2-base-patch16-224"),
}
"""Encoder names -> what loads them; the argument says whether the network may be used. Add your own here."""
