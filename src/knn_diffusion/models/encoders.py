"""The seam between this package and any joint text-image encoder: one protocol, a registry, and two adapters.

The bundled small encoder and real CLIP, SigLIP or SigLIP 2 (through transformers) answer the same calls. A vector never
depends on what else was encoded with it: texts go one by one, images in batches of a fixed size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
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
from knn_diffusion.errors import CheckpointError, MissingDependencyError, UsageError
from knn_diffusion.models.small_encoder import SmallEncoder, SmallEncoderConfig
from knn_diffusion.models.text_tower import SentenceEncoder, load_text_tower, save_text_tower
from knn_diffusion.shapes import Embeddings

KIND = "small-encoder"
TEXT_FOLDER = "text"
IMAGES_AT_ONCE = 16
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
        """One unit row per image."""

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

    def encode_images(self, images: Sequence[Image.Image]) -> Embeddings:
        """One unit row per image, squared to the tower's input first."""
        size = self.network.config.size
        arrays = [pictures.to_array(pictures.square(image, size)) for image in images]
        return self.encode_arrays(np.stack(arrays) if arrays else np.empty((0, size, size, 3), np.uint8))

    def encode_arrays(self, arrays: UInt8[np.ndarray, "queries height width 3"]) -> Embeddings:
        """One unit row per square of raw pixels that has the tower's size already."""
        device = self.network.text_head.weight.device

        def embed(rows: UInt8[np.ndarray, "queries height width 3"]) -> Tensor:
            return self.network.embed_images(pictures.pixels_from_uint8(rows).to(device))

        return _in_fixed_batches(embed, arrays, self.dim)

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


class TransformersEncoder:
    """A CLIP, SigLIP or SigLIP 2 model of the transformers library.

    Args:
        model: has get_image_features and get_text_features.
        image_processor: its own preprocessing, of the PIL backend.
        tokenizer: its own; texts are padded to the full length where the model was trained so.
    """

    def __init__(self, model: Any, image_processor: Any, tokenizer: Any, name: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.image_processor, self.tokenizer, self.name = image_processor, tokenizer, name
        self.max_tokens = int(model.config.text_config.max_position_embeddings)
        self.pads_to_full_length = str(model.config.model_type).startswith("siglip")
        text = model.config.text_config
        self.dim = int(
            getattr(model.config, "projection_dim", None) or getattr(text, "projection_size", text.hidden_size)
        )
        self.fingerprint = self._fingerprint()

    def to(self, device: torch.device | str) -> TransformersEncoder:
        """Work on that device; returns itself."""
        self.model.to(device)
        return self

    def encode_images(self, images: Sequence[Image.Image]) -> Embeddings:
        """One unit row per image."""
        if not images:
            return np.empty((0, self.dim), np.float32)
        prepared = [self._prepare(image) for image in images]
        arrays = {key: np.concatenate([one[key] for one in prepared]) for key in prepared[0]}

        def embed(rows: np.ndarray) -> Tensor:
            inputs = {key: torch.from_numpy(array[rows]).to(self.model.device) for key, array in arrays.items()}
            return F.normalize(vector_of(self.model.get_image_features(**inputs)).float(), dim=-1)

        return _in_fixed_batches(embed, np.arange(len(images)), self.dim)

    def encode_texts(self, texts: Sequence[str]) -> Embeddings:
        """One unit row per text.

        Raises: UsageError when a text is empty or longer than the text tower reads.
        """
        rows = [self._encode_text(text) for text in texts]
        return torch.cat(rows).cpu().numpy() if rows else np.empty((0, self.dim), np.float32)

    def _prepare(self, image: Image.Image) -> dict[str, np.ndarray]:
        made = self.image_processor(images=[image.convert("RGB")], return_tensors="np")
        return {key: np.asarray(value) for key, value in made.items()}

    def _encode_text(self, text: str) -> Float[Tensor, "batch dim"]:
        if not text.strip():
            raise UsageError(f"expected a prompt with at least one word, got {text!r}: say what to show")
        count = len(self.tokenizer(text, verbose=False)["input_ids"])
        if count > self.max_tokens:
            raise UsageError(
                f"expected a prompt of at most {self.max_tokens} tokens with its markers, got {count} ({text[:30]!r}...): "
                "shorten the prompt"
            )
        full = {"padding": "max_length", "max_length": self.max_tokens, "truncation": True}
        inputs = self.tokenizer([text], return_tensors="pt", **(full if self.pads_to_full_length else {}))
        with torch.inference_mode():
            features = self.model.get_text_features(
                **{key: value.to(self.model.device) for key, value in inputs.items()}
            )
            return F.normalize(vector_of(features).float(), dim=-1)

    def _fingerprint(self) -> str:
        settings = self.image_processor.to_dict()
        probe = self.tokenizer("A photo of a Cat, 3 dogs!", verbose=False)["input_ids"]
        facts = [settings, self.max_tokens, self.pads_to_full_length, len(self.tokenizer), list(probe)]
        preprocessing = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.sha256((weights_digest(self.model.state_dict()) + preprocessing).encode()).hexdigest()


def vector_of(features: Any) -> Float[Tensor, "batch dim"]:
    """The vectors that get_image_features or get_text_features gave: a tensor before transformers 5, an object since."""
    return features if isinstance(features, Tensor) else features.pooler_output


def load_encoder(name_or_dir: str | Path, *, network: bool = False) -> JointEncoder:
    """The encoder of a registered name, of a folder, or of a Hugging Face model id.

    Args:
        network: whether a model id may be fetched; otherwise it must lie in the local cache.

    Raises: UsageError when there is no such encoder; CheckpointError when it is damaged; MissingDependencyError when it
    needs transformers and that is not installed.
    """
    name = str(name_or_dir)
    if name in REGISTRY:
        return REGISTRY[name](network)
    folder = Path(name_or_dir)
    if not folder.is_dir():
        return load_transformers_encoder(name, network=network)
    if (folder / CONFIG_FILE).is_file() and "model_type" in read_facts(folder / CONFIG_FILE):
        return load_transformers_encoder(folder)
    return load_small_encoder(folder)


def load_small_encoder(folder: Path) -> SmallJointEncoder:
    """Read an encoder that `save_encoder` or the training wrote.

    Raises: CheckpointError when a part of it is missing, damaged or of another kind.
    """
    part = load_part(folder, kind=KIND, config_class=SmallEncoderConfig)
    network = SmallEncoder(part.config)
    apply_weights(network, part.weights, str(folder))
    facts = dict(part.extra)
    return SmallJointEncoder(network, load_text_tower(folder / TEXT_FOLDER), facts.pop("name", folder.name), facts)


def load_transformers_encoder(name_or_dir: str | Path, *, network: bool = False) -> TransformersEncoder:
    """Load CLIP, SigLIP or SigLIP 2 through transformers, from a folder, the local cache or, if asked, the network.

    Raises: MissingDependencyError without transformers; UsageError when the model is not there.
    """
    try:
        import transformers
    except ImportError:
        raise MissingDependencyError(
            f"expected transformers for the encoder {str(name_or_dir)!r}, it is not installed: pip install 'knn-diffusion[clip]'"
        ) from None
    auto: Any = transformers
    local = {"local_files_only": not network}
    try:
        model = auto.AutoModel.from_pretrained(name_or_dir, dtype=torch.float32, **local)
        processor = auto.AutoImageProcessor.from_pretrained(name_or_dir, backend="pil", **local)
        tokenizer = auto.AutoTokenizer.from_pretrained(name_or_dir, **local)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        known = ", ".join(REGISTRY)
        raise UsageError(
            f"expected an encoder ({known}), a folder or a model id in the local cache, got {str(name_or_dir)!r} ({reason}): "
            "check the name or fetch the model first"
        ) from None
    if not hasattr(model, "get_image_features") or not hasattr(model, "get_text_features"):
        raise UsageError(
            f"expected a joint text-image model, {str(name_or_dir)!r} is a {type(model).__name__}: choose CLIP or SigLIP"
        )
    return TransformersEncoder(model, processor, tokenizer, str(name_or_dir))


def save_encoder(encoder: JointEncoder, folder: Path) -> None:
    """Write an encoder so that `load_encoder(folder)` gives one with the same fingerprint.

    Raises: UsageError when it is an encoder of another making.
    """
    if isinstance(encoder, SmallJointEncoder):
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


def _in_fixed_batches(embed: Callable[[np.ndarray], Tensor], rows: np.ndarray, dim: int) -> Embeddings:
    """Embed rows in batches of one fixed size, the last filled up, so that a vector does not depend on its company."""
    made = np.empty((len(rows), dim), np.float32)
    with torch.inference_mode():
        for start in range(0, len(rows), IMAGES_AT_ONCE):
            some = rows[start : start + IMAGES_AT_ONCE]
            filled = np.concatenate([some, np.repeat(some[-1:], IMAGES_AT_ONCE - len(some), axis=0)])
            made[start : start + len(some)] = embed(filled)[: len(some)].cpu().numpy()
    return made


def _load_bundled(network: bool) -> JointEncoder:
    folder = BUNDLES / "stickers" / "encoder"
    if not folder.is_dir():
        raise CheckpointError(f"expected the bundled encoder in {folder}, found none: install the package again")
    return load_small_encoder(folder)


def _load_published(model_id: str) -> Callable[[bool], JointEncoder]:
    return lambda network: load_transformers_encoder(model_id, network=network)


REGISTRY: dict[str, Callable[[bool], JointEncoder]] = {
    "stickers": _load_bundled,
    "clip": _load_published("openai/clip-vit-base-patch32"),
    "siglip": _load_published("google/siglip-base-patch16-224"),
    "siglip2": _load_published("google/siglip2-base-patch16-224"),
}
"""Encoder names -> what loads them; the argument says whether the network may be used. Add your own here."""
