"""A checkpoint of another project to a part folder of ours: what is it, does it fit, write it with a note of its origin."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from knn_diffusion.checkpoint import (
    CONFIG_FILE,
    atomic_folder,
    atomic_write_bytes,
    file_digest,
    read_facts,
    save_part,
    save_weights,
)
from knn_diffusion.config import to_dict
from knn_diffusion.convert import vq_diffusion
from knn_diffusion.convert.legacy import read_tensors
from knn_diffusion.errors import CheckpointError, UsageError

NULL_FILE = "null_condition.safetensors"
"""The condition that VQ-Diffusion was trained with for guidance, as `y` [slots, dim]."""
WEIGHTS = tuple(f"diffusion_pytorch_model.{ending}" for ending in ("safetensors", "bin"))
SIGMOID_GELU = {"geglu-approximate": True, "gelu": False}
"""How diffusers calls the two."""
CUMULATIVE = {"alpha_cum_start": 0.99999, "alpha_cum_end": 9e-6, "gamma_cum_start": 9e-6, "gamma_cum_end": 0.99999}


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What was recognised and written.

    part         kind of the part folder
    recognized   whose layout the checkpoint has, for people
    parameters   number of values written
    source       the file they came from
    sha256       its digest
    null         whether a trained null condition lies beside the weights
    """

    part: str
    recognized: str
    parameters: int
    source: str
    sha256: str
    null: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """A weights file, and what the folder it lies in says of it."""

    weights: Path
    heads: int | None = None
    sigmoid_gelu: bool = True
    null: Path | None = None


def convert(checkpoint: Path, folder: Path, *, heads: int | None = None) -> Conversion:
    """Write the part that a checkpoint holds; nothing of the checkpoint is run.

    Args:
        checkpoint: a file of microsoft's VQ-Diffusion, or a folder of diffusers' with or without its pipeline around it.
        folder: a new one.
        heads: of the attentions, where nothing in the checkpoint tells it; VQ-Diffusion's 16 by default.
    Raises: UsageError when `folder` holds files; CheckpointError when the checkpoint is damaged, of another network or
    put together wrongly.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"expected a new or empty folder to write to, {folder} holds files: choose another name")
    source = _in_folder(checkpoint) if checkpoint.is_dir() else _Source(weights=checkpoint)
    tensors = read_tensors(source.weights)
    found = vq_diffusion.find(tensors)
    if found is None:
        some = ", ".join(list(tensors)[: vq_diffusion.SHOWN]) or "none"
        raise CheckpointError(
            f"expected the transformer of VQ-Diffusion, {source.weights} holds {len(tensors)} tensors ({some}) and no "
            f"{vq_diffusion.ANCHOR}: see docs/converting.md for what can be converted"
        )
    asked = heads or source.heads or vq_diffusion.HEADS
    config = vq_diffusion.denoiser_config(found, heads=asked, sigmoid_gelu=source.sigmoid_gelu)
    schedule = vq_diffusion.schedule_of(found, config)
    null = found.null if source.null is None else read_tensors(source.null).get("embeddings")
    if null is not None and (null.shape[1:] != (config.condition_dim,) or not null.isfinite().all()):
        raise CheckpointError(
            f"expected a null condition of finite {config.condition_dim}-d slots, got {list(null.shape)}: "
            "download the checkpoint again"
        )
    weights = vq_diffusion.denoiser_weights(found, config)
    made = Conversion(
        part="denoiser",
        recognized=found.layout,
        parameters=sum(tensor.numel() for tensor in weights.values()),
        source=source.weights.name,
        sha256=file_digest(source.weights),
        null=null is not None,
    )
    with atomic_folder(folder) as temporary:
        facts = {"schedule": to_dict(schedule), "origin": made.to_dict()}
        save_part(temporary, kind=made.part, config=config, weights=weights, extra=facts)
        if null is not None:
            save_weights(temporary / NULL_FILE, {"y": null.float()})
        atomic_write_bytes(temporary / "README.md", card(made).encode())
    return made


def card(made: Conversion) -> str:
    """A line of Markdown that says where the weights are from."""
    return (
        f"A {made.part} for knn-diffusion, converted from `{made.source}` (SHA-256 `{made.sha256}`) in the layout of "
        f"{made.recognized}. Its license is that of the original.\n"
    )


def _in_folder(folder: Path) -> _Source:
    """What a folder of diffusers holds: the transformer itself, or a pipeline around it.

    Raises: CheckpointError when it is another model's, or its pipeline has another schedule.
    """
    inside = folder / "transformer" if (folder / "transformer").is_dir() else folder
    weights = next((inside / name for name in WEIGHTS if (inside / name).is_file()), None)
    if weights is None or not (inside / CONFIG_FILE).is_file():
        raise CheckpointError(
            f"expected {CONFIG_FILE} and {' or '.join(WEIGHTS)} in {inside}, found none: name the folder of diffusers' "
            "transformer, or the checkpoint itself"
        )
    facts = read_facts(inside / CONFIG_FILE)
    for name, value, known in (
        ("activation_fn", facts.get("activation_fn"), SIGMOID_GELU),
        ("norm_eps", facts.get("norm_eps", 1e-5), (1e-5,)),
    ):
        if value not in known:
            raise CheckpointError(
                f"expected {name} to be {' or '.join(map(str, known))} in {inside / CONFIG_FILE}, got {value}: "
                "convert a VQ-Diffusion model"
            )
    scheduler = folder / "scheduler" / "scheduler_config.json"
    constants = read_facts(scheduler) if inside != folder and scheduler.is_file() else {}
    other = [name for name, value in CUMULATIVE.items() if abs(constants.get(name, value) - value) > 1e-9]
    if other:
        raise CheckpointError(f"expected VQ-Diffusion's released noise schedule, {scheduler} has another {other[0]}")
    embeddings = folder / "learned_classifier_free_sampling_embeddings"
    return _Source(
        weights=weights,
        heads=facts.get("num_attention_heads"),
        sigmoid_gelu=SIGMOID_GELU[str(facts["activation_fn"])],
        null=next((embeddings / name for name in WEIGHTS if (embeddings / name).is_file()), None),
    )
