"""A model on disk: `pipeline.json` names the parts, each part has its folder, a card says what the model is.

    pipeline.json   format, name, digest of each part, default settings, facts of the training run
    encoder/  tokenizer/  denoiser/   config.json + model.safetensors each
    index/          the images to retrieve from (optional)
    README.md       model card, written from the facts

Whatever is read is verified: digests against bit rot, fingerprints against parts that do not belong together.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from knn_diffusion.checkpoint import (
    CONFIG_FILE,
    apply_weights,
    atomic_folder,
    atomic_write_bytes,
    load_part,
    read_facts,
    save_part,
    save_weights,
    stored_config,
    write_json,
)
from knn_diffusion.config import config, require, to_dict
from knn_diffusion.device import own_defaults
from knn_diffusion.diffusion.conditioning import MAX_QUERY_WEIGHT
from knn_diffusion.diffusion.plan import SamplerConfig
from knn_diffusion.diffusion.process import Schedule
from knn_diffusion.errors import CheckpointError, FingerprintError, UsageError
from knn_diffusion.hub import fetch, is_hub_id, part_files
from knn_diffusion.model_card import model_card
from knn_diffusion.models.denoiser import Denoiser, DenoiserConfig
from knn_diffusion.models.encoders import JointEncoder, load_encoder, save_encoder
from knn_diffusion.models.text_states import NULL_FILE, load_null, states_shape
from knn_diffusion.models.tokenizer_protocol import Tokenizer
from knn_diffusion.models.tokenizers import load_tokenizer, save_tokenizer

FORMAT_VERSION = 1
PIPELINE_FILE = "pipeline.json"
PARTS = ("encoder", "tokenizer", "denoiser")
MODEL_FILES = (
    PIPELINE_FILE,
    "README.md",
    *(pattern for part in PARTS for pattern in part_files(part)),
    "index/store.sqlite",
    "index/segments/*.npy",
)
"""What is sent to the hub and fetched from it; a star stands for folders too."""
BUNDLES = Path(__file__).parent / "bundles"


@config
class PipelineFile:
    """What `pipeline.json` holds.

    name      how the model is called in answers and settings
    parts     digest of each part's weights, so that a part of another model is noticed
    sampler   how the model draws when a request does not say otherwise
    k         neighbors retrieved for each prompt; 0 for a denoiser that was trained without (the paper's no-kNN baseline)
    query_weight  how much of the text's own embedding the query slot has against the neighbors' mean; 1 is the paper's
    agreement     neighbors of a smaller cosine to the first are left out; 0 leaves none out, as in the paper
    facts     what the training run wrote down: data, recipe, commit, hardware, scores; shown on the model card
    """

    name: str
    parts: dict[str, str]
    sampler: SamplerConfig
    k: int = 10
    query_weight: float = 1.0
    agreement: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        require(self.k >= 0, "k", self.k, "at least 0")
        fits = 0 <= self.query_weight <= MAX_QUERY_WEIGHT
        require(fits, "query_weight", self.query_weight, f"in [0, {MAX_QUERY_WEIGHT:g}]")
        require(0 <= self.agreement <= 1, "agreement", self.agreement, "in [0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The parts that draw, as loaded or as trained; nothing changes them."""

    name: str
    encoder: JointEncoder
    tokenizer: Tokenizer
    denoiser: Denoiser
    schedule: Schedule
    sampler: SamplerConfig
    k: int = 10
    query_weight: float = 1.0
    agreement: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    reads_text: bool = False
    """Whether the denoiser reads the states of a text instead of neighbors, as VQ-Diffusion's do."""
    null: Float[Tensor, "slots dim"] | None = None
    """What a denoiser of texts was trained with for guidance; without it the empty text stands for none."""
    folder: Path | None = None
    """Where the parts were read from; None for parts that were never saved."""


def bundled_models() -> list[str]:
    """Names of the models inside the package."""
    return sorted(path.parent.name for path in BUNDLES.glob(f"*/{PIPELINE_FILE}"))


def resolve_model(name_or_folder: str | Path, revision: str | None = None) -> Path:
    """The folder of a bundled name, the folder itself or `model` in it, or that of the hub's `owner/name`, downloaded where it must be.

    Raises: CheckpointError when there is none; HubError when the hub has none or cannot be reached.
    """
    if is_hub_id(name_or_folder):
        return fetch(str(name_or_folder), MODEL_FILES, needs=PIPELINE_FILE, revision=revision)
    if revision is not None:
        raise UsageError(f"expected no revision for {str(name_or_folder)!r}, which is no owner/name: leave it out")
    for folder in (Path(name_or_folder), Path(name_or_folder) / "model", BUNDLES / str(name_or_folder)):
        if (folder / PIPELINE_FILE).is_file():
            return folder
    known = ", ".join(bundled_models()) or "none"
    raise CheckpointError(
        f"expected a model folder (with {PIPELINE_FILE}), a bundled name ({known}) or owner/name on the hub, got "
        f"{str(name_or_folder)!r}: check the name or train a model"
    )


def read_pipeline_file(folder: Path) -> PipelineFile:
    """`pipeline.json` of a model folder.

    Raises: CheckpointError when it is of another format or damaged.
    """
    values = read_facts(folder / PIPELINE_FILE)
    if values.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / PIPELINE_FILE} has format {values.get('format_version')}, this version reads {FORMAT_VERSION}: "
            "upgrade knn-diffusion"
        )
    return stored_config(PipelineFile, values, folder / PIPELINE_FILE)


@own_defaults()
def load_model(name_or_folder: str | Path, revision: str | None = None) -> Model:
    """Read and verify every part of a model, float32 on the CPU.

    Raises: CheckpointError when a part is missing or damaged; FingerprintError when parts do not belong together; HubError
        as `resolve_model`.
    """
    folder = resolve_model(name_or_folder, revision)
    file = read_pipeline_file(folder)
    check_belonging(folder, file)
    encoder = load_encoder(folder / "encoder")
    tokenizer, _ = load_tokenizer(folder / "tokenizer")
    denoiser, schedule, facts = load_denoiser(folder / "denoiser")
    model = Model(
        name=file.name,
        encoder=encoder,
        tokenizer=tokenizer,
        denoiser=denoiser,
        schedule=schedule,
        sampler=file.sampler,
        k=file.k,
        query_weight=file.query_weight,
        agreement=file.agreement,
        facts=file.facts,
        reads_text=facts.get("reads") == "text",
        null=load_null(folder / "denoiser"),
        folder=folder,
    )
    check_fit(model, facts.get("encoder"))
    return model


@own_defaults()
def load_denoiser(folder: Path) -> tuple[Denoiser, Schedule, dict[str, Any]]:
    """A denoiser, its noise schedule and the facts beside it. Raises: CheckpointError when it is missing or damaged."""
    part = load_part(folder, kind="denoiser", config_class=DenoiserConfig)
    if "schedule" not in part.extra:
        raise CheckpointError(
            f"expected the noise schedule in {folder / CONFIG_FILE}, found none: train the denoiser again"
        )
    schedule = stored_config(Schedule, part.extra["schedule"], folder / CONFIG_FILE)
    denoiser = Denoiser(part.config)
    apply_weights(denoiser, part.weights, str(folder))
    return denoiser.eval().requires_grad_(False), schedule, part.extra


def check_belonging(folder: Path, file: PipelineFile) -> None:
    """Hold each part's stored digest against the one `pipeline.json` names.

    Raises: CheckpointError when a part is missing; FingerprintError when it is another model's.
    """
    for part in PARTS:
        stored = folder / part / CONFIG_FILE
        if not stored.is_file():
            raise CheckpointError(
                f"expected the model's {part} in {folder / part}, found none: copy the whole folder again"
            )
        found = _digest(folder / part)
        if found != file.parts.get(part):
            raise FingerprintError(
                f"{folder / PIPELINE_FILE} was written for the {part} {str(file.parts.get(part))[:12]}, the folder holds "
                f"{found[:12]}: restore that part or save the model again"
            )


def check_fit(model: Model, trained_with: str | None) -> None:
    """Hold the parts against each other: encoder, vocabulary, grid, schedule.

    Raises: FingerprintError when the denoiser was trained with another encoder; CheckpointError when sizes differ.
    """
    if trained_with is not None and trained_with != model.encoder.fingerprint:
        raise FingerprintError(
            f"the denoiser was trained with the encoder {trained_with[:24]}, the model holds {model.encoder.name} "
            f"({model.encoder.fingerprint[:24]}): restore that encoder or train the denoiser again"
        )
    reads = model.denoiser.config
    slots, width = states_shape(model.encoder) if model.reads_text else (0, model.encoder.dim)
    null = model.null if model.null is not None else torch.zeros(slots, width)
    for what, expected, got in (
        ("embeddings of width", reads.condition_dim, width),
        ("a null condition of shape", [slots, width], list(null.shape)),
        ("a vocabulary of", reads.vocab_size, model.tokenizer.vocab_size),
        ("a grid of side", reads.grid, model.tokenizer.grid),
        ("a schedule for a vocabulary of", reads.vocab_size, model.schedule.vocab_size),
        ("a schedule of steps", reads.num_steps, model.schedule.num_steps),
    ):
        if expected != got:
            raise CheckpointError(f"the denoiser expects {what} {expected}, got {got}: combine parts trained together")


def save_model(model: Model, folder: Path) -> None:
    """Write the parts, `pipeline.json` and the card into `folder`; parts that were loaded are copied byte by byte."""
    for part in PARTS:
        if model.folder is not None:
            shutil.copytree(model.folder / part, folder / part)
    if model.folder is None:
        save_encoder(model.encoder, folder / "encoder")
        save_tokenizer(model.tokenizer, folder / "tokenizer")
        facts = {"encoder": model.encoder.fingerprint, "schedule": to_dict(model.schedule)}
        facts |= {"reads": "text"} if model.reads_text else {}
        weights = model.denoiser.state_dict()
        save_part(folder / "denoiser", kind="denoiser", config=model.denoiser.config, weights=weights, extra=facts)
        if model.null is not None:
            save_weights(folder / "denoiser" / NULL_FILE, {"y": model.null})
    write_pipeline_file(
        folder,
        name=model.name,
        sampler=model.sampler,
        k=model.k,
        query_weight=model.query_weight,
        agreement=model.agreement,
        facts=model.facts,
    )


def write_pipeline_file(
    folder: Path,
    *,
    name: str,
    sampler: SamplerConfig,
    k: int = 10,
    query_weight: float = 1.0,
    agreement: float = 0.0,
    facts: dict[str, Any] | None = None,
) -> PipelineFile:
    """Make a model of the parts that lie in `folder`: write `pipeline.json` with their digests, and the card."""
    digests = {part: _digest(folder / part) for part in PARTS}
    drawing = {"sampler": sampler, "k": k, "query_weight": query_weight, "agreement": agreement}
    file = PipelineFile(name=name, parts=digests, facts=facts or {}, **drawing)  # type: ignore[arg-type]
    write_json(folder / PIPELINE_FILE, to_dict(file))
    card = model_card(name, sampler, k, file.parts, file.facts)
    atomic_write_bytes(folder / "README.md", card.encode())
    return file


def replace_model_folder(folder: Path) -> Any:
    """A context that fills `folder` in one step; refuses to replace what is no model folder.

    Raises: UsageError when `folder` exists, is not empty and holds no `pipeline.json`.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (folder / PIPELINE_FILE).is_file():
        raise UsageError(
            f"expected a new folder or a model to replace, {folder} holds other files: choose another place"
        )
    return atomic_folder(folder)


def _digest(part: Path) -> str:
    return str(read_facts(part / CONFIG_FILE).get("weights_sha256"))
