"""Image tokenizers on disk: which kinds of part there are, and the one of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from knn_diffusion.checkpoint import CONFIG_FILE, LoadedPart, apply_weights, load_part, read_facts, save_part
from knn_diffusion.device import own_defaults
from knn_diffusion.errors import UsageError
from knn_diffusion.models.taming import TamingConfig, TamingTokenizer
from knn_diffusion.models.tokenizer import VQGAN, TokenizerConfig
from knn_diffusion.models.tokenizer_protocol import Tokenizer

KINDS: dict[str, tuple[type, type]] = {
    "tokenizer": (TokenizerConfig, VQGAN),
    "taming-tokenizer": (TamingConfig, TamingTokenizer),
}
"""Kind of part -> its configuration and its network."""


def kind_of(folder: Path) -> str:
    """The kind of tokenizer in a folder; our own where the folder holds anything else, so that reading it says so."""
    file = folder / CONFIG_FILE
    kind = read_facts(file).get("kind") if file.is_file() else None
    return kind if kind in KINDS else "tokenizer"


def load_tokenizer_part(folder: Path) -> tuple[str, LoadedPart[Any]]:
    """Kind and verified content of a tokenizer's folder. Raises: CheckpointError when it is missing or damaged."""
    kind = kind_of(folder)
    return kind, load_part(folder, kind=kind, config_class=KINDS[kind][0])


@own_defaults()
def load_tokenizer(folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """A tokenizer and the facts beside it, float32 on the CPU.

    Raises: CheckpointError when it is missing or damaged.
    """
    kind, part = load_tokenizer_part(folder)
    tokenizer = KINDS[kind][1](part.config)
    apply_weights(tokenizer, part.weights, str(folder))
    return tokenizer.eval().requires_grad_(False), part.extra


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write a tokenizer so that `load_tokenizer(folder)` gives it again.

    Raises: UsageError when it is one of another making.
    """
    kind = next((name for name, (_, network) in KINDS.items() if isinstance(tokenizer, network)), None)
    if kind is None:
        name = type(tokenizer).__name__
        raise UsageError(f"expected a tokenizer of this package to save, got {name}: save it yourself")
    save_part(folder, kind=kind, config=tokenizer.config, weights=tokenizer.state_dict())
