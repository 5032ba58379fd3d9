"""A whole model out of parts that were made one by one: converted, trained, taken out of another model, or of the hub.

Nothing is written before all parts are read and fit each other.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from knn_diffusion.checkpoint import CONFIG_FILE, atomic_folder
from knn_diffusion.diffusion.plan import SamplerConfig
from knn_diffusion.errors import CheckpointError, FingerprintError, UsageError
from knn_diffusion.hub import is_hub_id
from knn_diffusion.image_index import ImageIndex
from knn_diffusion.model_folder import (
    PARTS,
    PIPELINE_FILE,
    Model,
    PipelineFile,
    bundled_models,
    check_fit,
    load_denoiser,
    read_pipeline_file,
    resolve_model,
    write_pipeline_file,
)
from knn_diffusion.models.code_traits import traits_of
from knn_diffusion.models.encoders import JointEncoder, load_encoder, save_encoder
from knn_diffusion.models.text_states import load_null
from knn_diffusion.models.tokenizers import load_tokenizer

INDEX = "index"
TEXT_GUIDANCE = 5.0
"""λ for a denoiser of texts, VQ-Diffusion's own for its models with a learned null condition."""
ROUNDED = 0.02
"""How far what a denoiser knows of its tokenizer's codes may be from these, in deviations: both rest in half precision."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Parts:
    """Where the parts are: folders, or models that have them (folder, bundled name or owner/name of the hub).

    What is None lies in the model's folder already. The encoder may also be a registered name or a repository of CLIP or SigLIP, and
    without any it is the index's; a model may go without an index.
    """

    encoder: str | Path | None = None
    tokenizer: str | Path | None = None
    denoiser: str | Path | None = None
    index: str | Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """How the model draws when a request does not say otherwise.

    What is None is as in the model that the denoiser is from; of a denoiser alone, 16 steps in Halton's order, or for one that reads
    texts as many ancestral steps as it was trained with.
    """

    k: int | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    order: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Assembled:
    """What was put together.

    model       its folder
    parts       digest of each part
    reads_text  whether its denoiser reads the text instead of neighbors
    images      how many its index holds; None without an index
    """

    model: Path
    name: str
    parts: Mapping[str, str]
    sampler: SamplerConfig
    k: int
    reads_text: bool
    images: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Read:
    """The parts as they were read, and the folders of those that are copied."""

    model: Model
    folders: Mapping[str, Path]
    index: ImageIndex | None
    origins: Mapping[str, str] = field(default_factory=dict)


def assemble(
    folder: Path,
    parts: Parts,
    *,
    name: str | None = None,
    drawing: Drawing | None = None,
    license: str | None = None,
) -> Assembled:
    """Write a model folder: parts, index, `pipeline.json` and card.

    Args:
        folder: a new one, or one that holds nothing but some of the parts.
        name: how the model is called; the folder's name by default.
        license: the hub's short name of one, for the card; that of the model the denoiser is from, or unknown.

    Raises: UsageError when a part is missing or `folder` holds other things; CheckpointError when a part is damaged or of another
        size; FingerprintError when denoiser or index were made with another encoder, or the denoiser with another tokenizer;
        KnnDiffusionError when the disk is full: then nothing is changed.
    """
    _check_place(folder, parts)
    read = _read(folder, parts)
    source = _model_around(read.folders["denoiser"])
    sampler, k = _drawing(read.model, source, drawing or Drawing())
    facts = {} if source is None else dict(source.facts)
    facts |= {"license": license or facts.get("license", "unknown"), "put_together_from": dict(read.origins)}
    with atomic_folder(folder) as temporary:
        save_encoder(read.model.encoder, temporary / "encoder")
        for part, there in read.folders.items():
            shutil.copytree(there, temporary / part)
        images = None if read.index is None else _copy(read.index, folder / INDEX, temporary / INDEX)
        file = write_pipeline_file(
            temporary,
            name=name or folder.absolute().name,
            sampler=sampler,
            k=k,
            query_weight=1.0 if source is None else source.query_weight,
            agreement=0.0 if source is None else source.agreement,
            facts=facts,
        )
    return Assembled(
        model=folder.absolute(),
        name=file.name,
        parts=file.parts,
        sampler=sampler,
        k=k,
        reads_text=read.model.reads_text,
        images=images,
    )


def _copy(index: ImageIndex, own: Path, folder: Path) -> int:
    """Into a new folder; the index that lies in the model's own folder with what was made for its searches."""
    with index:
        count = len(index)
        if index.folder is None or index.folder.absolute() != own.absolute():
            index.save(folder)
            return count
    shutil.copytree(own, folder)
    return count


def _check_place(folder: Path, parts: Parts) -> None:
    if (folder / PIPELINE_FILE).exists():
        raise UsageError(f"expected a new folder, {folder} is a model already: choose another name")
    found = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if folder.exists() and (not folder.is_dir() or set(found) - {*PARTS, INDEX}):
        raise UsageError(
            f"expected a new folder, or one with nothing but {', '.join(PARTS)} and {INDEX}, {folder} holds other files: "
            "choose another name"
        )
    if twice := [name for name, named in asdict(parts).items() if named is not None and name in found]:
        raise UsageError(
            f"expected one {twice[0]}, {folder} holds one already: leave out --{twice[0]}, or choose another name for the model"
        )


def _read(folder: Path, parts: Parts) -> _Read:
    """All parts, held against each other."""
    folders = {
        "tokenizer": _part_folder("tokenizer", parts.tokenizer, folder),
        "denoiser": _part_folder("denoiser", parts.denoiser, folder),
    }
    tokenizer, tokenizer_facts = load_tokenizer(folders["tokenizer"])
    denoiser, schedule, facts = load_denoiser(folders["denoiser"])
    reads_text = facts.get("reads") == "text"
    there = parts.index or (folder / INDEX if (folder / INDEX).is_dir() else None)
    if there is not None and reads_text:
        raise UsageError(
            f"expected no index, the denoiser in {folders['denoiser']} reads the text and no neighbors: leave it out"
        )
    encoder = _encoder(parts.encoder, folder, there)
    model = Model(
        name="",
        encoder=encoder,
        tokenizer=tokenizer,
        denoiser=denoiser,
        schedule=schedule,
        sampler=SamplerConfig(),
        reads_text=reads_text,
        null=load_null(folders["denoiser"]),
    )
    check_fit(model, facts.get("encoder"))
    _check_codes(model)
    origins = {"encoder": encoder.name, "tokenizer": _origin(tokenizer_facts), "denoiser": _origin(facts)}
    index = None if there is None else ImageIndex.open(there, encoder, read_only=True)
    return _Read(model=model, folders=folders, index=index, origins=origins)


def _part_folder(part: str, named: str | Path | None, model: Path) -> Path:
    """Where a part is: as named, inside a model of that name, or where it shall be."""
    if named is None:
        if not (model / part / CONFIG_FILE).is_file():
            raise UsageError(f"expected a {part} for the model, got none and {model} holds none: add --{part} FOLDER")
        return model / part
    for place in (Path(named), Path(named) / part):
        if (place / CONFIG_FILE).is_file():
            return place
    if is_hub_id(named) or str(named) in bundled_models():
        return resolve_model(named) / part
    raise CheckpointError(
        f"expected a {part} (a folder with {CONFIG_FILE}), or a model that has one, got {str(named)!r}: check the path"
    )


def _encoder(named: str | Path | None, model: Path, index: str | Path | None) -> JointEncoder:
    if named is not None:
        inside = Path(named) / "encoder"
        if (inside / CONFIG_FILE).is_file() and not (Path(named) / CONFIG_FILE).is_file():
            return load_encoder(inside)
        return load_encoder(named, network=is_hub_id(named))
    if (model / "encoder" / CONFIG_FILE).is_file():
        return load_encoder(model / "encoder")
    if index is not None:
        with ImageIndex.open(index, read_only=True) as opened:
            return opened.encoder
    raise UsageError(
        f"expected an encoder for the model, got none and {model} holds none: add --encoder NAME or --encoder FOLDER"
    )


def _check_codes(model: Model) -> None:
    """Hold the codes that a denoiser knows against its tokenizer's. Raises: FingerprintError when they are another's."""
    known = model.denoiser.code_traits
    if known is None:
        return
    held = traits_of(model.tokenizer.codes)
    if held.shape != known.traits.shape or not torch.allclose(held, known.traits, atol=ROUNDED, rtol=ROUNDED):
        raise FingerprintError(
            f"the denoiser knows {known.traits.shape[1] // 2} coordinates of its tokenizer's codes, those of this one "
            f"({held.shape[1] // 2}) are others: name the tokenizer it was trained with"
        )


def _model_around(part: Path) -> PipelineFile | None:
    return read_pipeline_file(part.parent) if (part.parent / PIPELINE_FILE).is_file() else None


def _drawing(model: Model, source: PipelineFile | None, asked: Drawing) -> tuple[SamplerConfig, int]:
    trained = model.schedule.num_steps
    if source is not None:
        sampler = source.sampler
    elif model.reads_text:
        sampler = SamplerConfig(num_steps=trained, order="ancestral", guidance_scale=TEXT_GUIDANCE)
    else:
        sampler = SamplerConfig(num_steps=min(SamplerConfig().num_steps, trained))
    changes: dict[str, Any] = {
        "num_steps": asked.num_steps,
        "guidance_scale": asked.guidance_scale,
        "order": asked.order,
    }
    sampler = replace(sampler, **{name: value for name, value in changes.items() if value is not None})
    if sampler.num_steps > trained:
        raise UsageError(f"expected at most {trained} steps, as trained, got {sampler.num_steps}: ask for fewer")
    k = 10 if source is None else source.k
    return sampler, k if asked.k is None else asked.k


def _origin(facts: Mapping[str, Any]) -> str:
    """Where a part is from, as its folder tells."""
    origin = facts.get("origin")
    if isinstance(origin, Mapping):
        return f"{origin.get('recognized')}, converted from {origin.get('source')} (SHA-256 {origin.get('sha256')})"
    return f"trained for {facts['steps']} steps" if "steps" in facts else "trained by this package"
