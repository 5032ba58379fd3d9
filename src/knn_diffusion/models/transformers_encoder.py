"""CLIP, SigLIP and SigLIP 2 through transformers: from a folder as the Hugging Face hub has it, read without running any of it.

transformers builds the network and prepares images and texts. Its weights are read here, in one file or in several, from safetensors
or, where a repository has none, by the reader of `convert.legacy` that runs no pickle; transformers itself would unpickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from knn_diffusion.checkpoint import CONFIG_FILE, WEIGHTS_FILE, read_facts, weights_digest
from knn_diffusion.convert.legacy import read_tensors
from knn_diffusion.convert.shards import read_shards, shard_names
from knn_diffusion.device import own_defaults
from knn_diffusion.errors import CheckpointError, MissingDependencyError, UsageError
from knn_diffusion.hub import fetch
from knn_diffusion.images import is_transparent, square
from knn_diffusion.models.fixed_batches import in_fixed_batches
from knn_diffusion.shapes import Embeddings

INDEX = ".index.json"
"""How the name of an index of several files ends, after the name that the one file would have."""
PICKLED = "pytorch_model.bin"
WEIGHTS = (WEIGHTS_FILE, WEIGHTS_FILE + INDEX, PICKLED, PICKLED + INDEX)
"""Where the weights may be; the first that is there is read."""
ENCODER_FILES = (
    CONFIG_FILE,
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.model",
    "text/*.json",
    "text/*.safetensors",
    WEIGHTS_FILE,
    WEIGHTS_FILE + INDEX,
)
"""What is fetched of an encoder's repository, and the files that an index names; pickles only where there are no safetensors."""
USUAL_SIZE = 224
"""Side in pixels of a framed picture where the network reads pictures of any size."""
WORDS_TRIED = 300
"""Entries of a vocabulary, evenly spread, that are looked for in what its tokenizer makes of them."""
PROBES = ("a cat", "a dog")
HERE = {"local_files_only": True, "trust_remote_code": False}
DIGEST = "weights_sha256"
"""In the `config.json` of an encoder that was saved here: its fingerprint."""


class TransformersEncoder:
    """A CLIP, SigLIP or SigLIP 2 model of the transformers library.

    Args:
        model: has get_image_features and get_text_features.
        image_processor: its own preprocessing, of the PIL backend.
        tokenizer: its own. The SigLIPs were trained with texts in small letters, filled up to the full length with places
            that are read as any other; what their tokenizers leave out of that is done here.
    """

    def __init__(self, model: Any, image_processor: Any, tokenizer: Any, name: str) -> None:
        self.model = model.eval().requires_grad_(False)
        self.image_processor, self.tokenizer, self.name = image_processor, tokenizer, name
        self.max_tokens = int(model.config.text_config.max_position_embeddings)
        self.is_siglip = str(model.config.model_type).startswith("siglip")
        self.image_size = int(getattr(model.config.vision_config, "image_size", USUAL_SIZE))
        text = model.config.text_config
        self.dim = int(
            getattr(model.config, "projection_dim", None) or getattr(text, "projection_size", text.hidden_size)
        )
        self.fingerprint = self._fingerprint()

    def to(self, device: torch.device | str) -> TransformersEncoder:
        """Work on that device; returns itself."""
        self.model.to(device)
        return self

    @own_defaults()
    def encode_images(self, images: Sequence[Image.Image]) -> Embeddings:
        """One unit row per image; those with transparency are framed and lie on a ground that shows them."""
        if not images:
            return np.empty((0, self.dim), np.float32)
        prepared = [self._prepare(image) for image in images]
        arrays = {key: np.concatenate([one[key] for one in prepared]) for key in prepared[0]}

        def embed(rows: np.ndarray) -> Tensor:
            inputs = {key: torch.from_numpy(array[rows]).to(self.model.device) for key, array in arrays.items()}
            return F.normalize(vector_of(self.model.get_image_features(**inputs)).float(), dim=-1)

        return in_fixed_batches(embed, np.arange(len(images)), self.dim)

    @own_defaults()
    def encode_texts(self, texts: Sequence[str]) -> Embeddings:
        """One unit row per text.

        Raises: UsageError when a text is empty or longer than the text tower reads.
        """
        rows = [self._encode_text(text) for text in texts]
        return torch.cat(rows).cpu().numpy() if rows else np.empty((0, self.dim), np.float32)

    def _prepare(self, image: Image.Image) -> dict[str, np.ndarray]:
        opaque = square(image, self.image_size) if is_transparent(image) else image.convert("RGB")
        made = self.image_processor(images=[opaque], return_tensors="np")
        return {key: np.asarray(value) for key, value in made.items()}

    def _tokens(self, text: str, **settings: Any) -> Any:
        return self.tokenizer(text.lower() if self.is_siglip else text, verbose=False, **settings)

    def _encode_text(self, text: str) -> Float[Tensor, "batch dim"]:
        if not text.strip():
            raise UsageError(f"expected a prompt with at least one word, got {text!r}: say what to show")
        count = len(self._tokens(text)["input_ids"])
        if count > self.max_tokens:
            raise UsageError(
                f"expected a prompt of at most {self.max_tokens} tokens with its markers, got {count} ({text[:30]!r}...): "
                "shorten the prompt"
            )
        filled = {"padding": "max_length", "max_length": self.max_tokens, "padding_side": "right"}
        full = filled if self.is_siglip else {}
        ids = torch.tensor([self._tokens(text, **full)["input_ids"]], device=self.model.device)
        with torch.inference_mode():
            return F.normalize(vector_of(self.model.get_text_features(input_ids=ids)).float(), dim=-1)

    def _fingerprint(self) -> str:
        settings = self.image_processor.to_dict()
        probe = self._tokens("A photo of a Cat, 3 dogs!")["input_ids"]
        facts = [settings, self.max_tokens, self.is_siglip, len(self.tokenizer), list(probe)]
        preprocessing = json.dumps(facts, sort_keys=True, default=str)
        return hashlib.sha256((weights_digest(self.model.state_dict()) + preprocessing).encode()).hexdigest()


def vector_of(features: Any) -> Float[Tensor, "batch dim"]:
    """The vectors that get_image_features or get_text_features gave: a tensor before transformers 5, an object since."""
    return features if isinstance(features, Tensor) else features.pooler_output


def fetch_encoder(repository: str, *, network: bool, revision: str | None = None) -> Path:
    """The folder of an encoder's repository, downloaded where it may and must be.

    Raises: MissingDependencyError without transformers, before anything is downloaded; HubError as `hub.fetch`.
    """
    _transformers(repository)
    folder = fetch(repository, ENCODER_FILES, needs=CONFIG_FILE, revision=revision, network=network)
    commit = folder.name  # of which the rest is fetched too, whatever is newest by now
    if _weights_file(folder) is None:
        fetch(repository, WEIGHTS[2:], needs=WEIGHTS[2:], revision=commit, network=network)
    weights = _weights_file(folder)
    if weights is not None and weights.name.endswith(INDEX):
        names = shard_names(weights)
        fetch(repository, names, needs=names[0], revision=commit, network=network)
    return folder


def load_transformers_encoder(folder: Path, name: str) -> TransformersEncoder:
    """Read and verify CLIP, SigLIP or SigLIP 2 in a folder.

    Args:
        name: how messages call it.

    Raises: MissingDependencyError without transformers; UsageError when it is another kind of model; CheckpointError when
        something is missing or damaged.
    """
    model = load_network(folder, name, joint=True)
    library = _transformers(name)
    with _readable(folder, name):
        processor = library.AutoImageProcessor.from_pretrained(folder, backend="pil", **HERE)
        tokenizer = library.AutoTokenizer.from_pretrained(folder, **HERE)
    _require_vocabulary(tokenizer, int(model.config.text_config.vocab_size), folder)
    encoder = TransformersEncoder(model, processor, tokenizer, name)
    one, other = encoder.encode_texts(PROBES)
    if np.array_equal(one, other):
        raise CheckpointError(
            f"expected {folder} to tell texts apart, {PROBES[0]!r} and {PROBES[1]!r} get one vector: its tokenizer is of another "
            "model or incomplete, download it again"
        )
    if read_facts(folder / CONFIG_FILE).get(DIGEST, encoder.fingerprint) != encoder.fingerprint:
        raise CheckpointError(
            f"{folder} is damaged (its digest is not the one stored with it): copy or download it again"
        )
    return encoder


def load_network(folder: Path, name: str, *, joint: bool = False) -> Any:
    """Read and verify a network of transformers, its weights by our own reader.

    Args:
        name: how messages call it.
        joint: whether it must embed both images and texts.

    Raises: as `load_transformers_encoder`.
    """
    library, weights = _transformers(name), _weights(folder)
    attention = {"attn_implementation": "sdpa"}  # a configuration can name code of the hub to attend with
    with _readable(folder, name):
        config = library.AutoConfig.from_pretrained(folder, **HERE)
        with torch.device("meta"):
            network = type(library.AutoModel.from_config(config, trust_remote_code=False, **attention))
        if joint and not (hasattr(network, "get_image_features") and hasattr(network, "get_text_features")):
            raise UsageError(
                f"expected a joint text-image model, {name!r} is a {network.__name__}: choose CLIP or SigLIP"
            )
        model, report = network.from_pretrained(
            None,
            config=config,
            state_dict=weights,
            dtype=torch.float32,
            output_loading_info=True,
            **attention,
        )
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{folder}: {len(missing)} tensors missing (first: {missing[0]}): the weights are of another model"
        )
    if broken := [key for key, value in model.state_dict().items() if not value.isfinite().all()]:
        raise CheckpointError(f"{folder}: {broken[0]} holds values that are not finite: download it again")
    return model


@contextmanager
def _readable(folder: Path, name: str) -> Iterator[None]:
    """Errors of transformers as ours."""
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(f"{name}: {_one_line(error)}: install what it names") from None
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"expected a model of transformers in {folder}, it cannot be read ({_one_line(error)}): download it again"
        ) from None


def _require_vocabulary(tokenizer: Any, vocab_size: int, folder: Path) -> None:
    """Raise CheckpointError when the tokenizer's words are not those that the text tower has vectors for.

    Without its files transformers makes a tokenizer of two words, without its merges one that knows letters only.
    """
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    beyond = sum(number >= vocab_size for number in words)
    if len(words) < vocab_size / 2 or beyond > len(words) / 100:
        raise CheckpointError(
            f"expected the tokenizer in {folder} to know {vocab_size:,} words, as the text tower does, it knows {len(words):,}: "
            "download the folder again with vocab.json and merges.txt, or tokenizer.json"
        )
    ordinary = sorted(number for number in words if number not in set(tokenizer.all_special_ids))
    texts = {number: tokenizer.decode([number]).strip() for number in ordinary[:: max(1, len(ordinary) // WORDS_TRIED)]}
    long = {number: text for number, text in texts.items() if len(text) > 1 and text.isascii() and text.isalpha()}
    if long and not any(number in tokenizer(text, verbose=False)["input_ids"] for number, text in long.items()):
        raise CheckpointError(
            f"expected the tokenizer in {folder} to use its vocabulary, it makes {next(iter(long.values()))!r} of letters: "
            "download the folder again with merges.txt, or tokenizer.json"
        )


def _transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingDependencyError(
            f"expected transformers for the encoder {name!r}, it is not installed: pip install 'knn-diffusion[clip]'"
        ) from None
    return transformers


def _weights_file(folder: Path) -> Path | None:
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def _weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder's weights."""
    file = _weights_file(folder)
    if file is None:
        raise CheckpointError(f"expected weights in {folder} ({' or '.join(WEIGHTS)}), found none: download it again")
    return read_shards(file) if file.name.endswith(INDEX) else read_tensors(file)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
