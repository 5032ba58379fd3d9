"""Which weights file of a checkpoint to read, and what the folder around it says of the network."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from knn_diffusion.checkpoint import CONFIG_FILE, read_facts
from knn_diffusion.errors import CheckpointError

PartName = Literal["denoiser", "tokenizer"]

WEIGHTS = tuple(f"diffusion_pytorch_model.{ending}" for ending in ("safetensors", "bin"))
FOLDERS: dict[PartName, str] = {"denoiser": "transformer", "tokenizer": "vqvae"}
"""What a pipeline of diffusers calls the folders of our parts."""
SIGMOID_GELU = {"geglu-approximate": True, "gelu": False}
"""How diffusers calls the two."""
CUMULATIVE = {"alpha_cum_start": 0.99999, "alpha_cum_end": 9e-6, "gamma_cum_start": 9e-6, "gamma_cum_end": 0.99999}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A weights file, and what the folder it lies in says of it.

    weights       the file
    heads         of the transformer's attentions, where the folder tells
    sigmoid_gelu  whether its GELU is the approximation by a sigmoid
    null          file of the condition that was trained for guidance
    parts         what else lies beside it in a pipeline
    """

    weights: Path
    heads: int | None = None
    sigmoid_gelu: bool = True
    null: Path | None = None
    parts: tuple[PartName, ...] = ()


def find_source(checkpoint: Path, part: PartName | None) -> Source:
    """What a checkpoint holds: a file, a model of diffusers', or a pipeline around it.

    Args: part: which one of a pipeline; the denoiser when nothing is said.

    Raises: CheckpointError when a folder is another model's, or its pipeline has another schedule.
    """
    if not checkpoint.is_dir():
        return Source(weights=checkpoint)
    held = tuple(one for one, name in FOLDERS.items() if (checkpoint / name).is_dir())
    chosen = part if part in held or not held else held[0]
    inside = checkpoint / FOLDERS[chosen] if held and chosen else checkpoint
    weights = _weights_in(inside)
    if weights is None or not (inside / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"expected {CONFIG_FILE} and {' or '.join(WEIGHTS)} in {inside}, found none: name the folder of diffusers' "
            "transformer or vqvae, or the checkpoint itself"
        )
    facts = read_facts(inside / CONFIG_FILE)
    if "num_vq_embeddings" in facts:
        _hold(inside, facts, {"act_fn": ("silu", None), "norm_num_groups": (32, None), "norm_type": ("group", None)})
        return Source(weights=weights, parts=held)
    _hold(inside, facts, {"activation_fn": tuple(SIGMOID_GELU), "norm_eps": (1e-5, None)})
    if inside != checkpoint:
        _hold_schedule(checkpoint / "scheduler" / "scheduler_config.json")
    return Source(
        weights=weights,
        heads=facts.get("num_attention_heads"),
        sigmoid_gelu=SIGMOID_GELU[str(facts["activation_fn"])],
        null=_weights_in(checkpoint / "learned_classifier_free_sampling_embeddings"),
        parts=held,
    )


def _weights_in(folder: Path) -> Path | None:
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def _hold(folder: Path, facts: Mapping[str, Any], known: Mapping[str, Collection[object]]) -> None:
    """Refuse a model with settings that ours has not; None stands for a setting that is left out."""
    for name, values in known.items():
        if facts.get(name) not in values:
            wanted = " or ".join(str(value) for value in values if value is not None)
            raise CheckpointError(
                f"expected {name} to be {wanted} in {folder / CONFIG_FILE}, got {facts.get(name)}: "
                "convert a VQ-Diffusion model"
            )


def _hold_schedule(file: Path) -> None:
    constants = read_facts(file) if file.is_file() else {}
    other = [name for name, value in CUMULATIVE.items() if abs(constants.get(name, value) - value) > 1e-9]
    if other:
        raise CheckpointError(f"expected VQ-Diffusion's released noise schedule, {file} has another {other[0]}")
