"""A checkpoint of another project to a part folder of ours: what is it, does it fit, write it with a note of its origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from knn_diffusion.checkpoint import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    atomic_folder,
    atomic_write_bytes,
    file_digest,
    read_facts,
    save_part,
    save_weights,
)
from knn_diffusion.config import to_dict
from knn_diffusion.convert import taming, vq_diffusion
from knn_diffusion.convert.codes import CODES_FILE, keep, read_used_codes
from knn_diffusion.convert.fit import some
from knn_diffusion.convert.legacy import read_tensors
from knn_diffusion.convert.source import PartName, Source, find_source
from knn_diffusion.errors import CheckpointError, UsageError
from knn_diffusion.models.text_states import NULL_FILE
from knn_diffusion.models.tokenizers import KINDS, load_tokenizer_part

IMAGE_SIZE = 256
"""Of every published tokenizer; shapes do not tell it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What was recognised and written.

    part         kind of the part folder
    recognized   whose layout the checkpoint has, for people
    parameters   number of values written
    source       the file they came from
    sha256       its digest
    null         whether a trained null condition lies beside the weights
    also         another part that the checkpoint holds, which was not converted
    """

    part: str
    recognized: str
    parameters: int
    source: str
    sha256: str
    null: bool
    also: PartName | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Untold:
    """What no tensor tells: see `convert`."""

    heads: int | None
    image_size: int
    product: bool | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """What goes into a part folder; `beside` are small files of tensors."""

    kind: str
    recognized: str
    config: object
    weights: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)
    beside: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


def convert(
    checkpoint: Path,
    folder: Path,
    *,
    part: PartName | None = None,
    heads: int | None = None,
    image_size: int | None = None,
    product: bool | None = None,
    codes: Path | None = None,
) -> Conversion:
    """Write the part that a checkpoint holds; nothing of the checkpoint is run.

    Args:
        checkpoint: a file of VQ-Diffusion's, taming's or latent diffusion's, a folder of diffusers' with or without its
            pipeline around it, or, with `codes`, a tokenizer of this package.
        folder: a new one.
        part: which one, of a checkpoint that holds both; the denoiser when nothing is said.
        heads: of a denoiser's attentions, where nothing in the checkpoint tells it; VQ-Diffusion's 16 by default.
        image_size: side in pixels of a tokenizer's images, which no checkpoint tells; 256 by default.
        product: whether a tokenizer chooses codes by inner product, as IBQ, instead of by distance.
        codes: file of the codes that the tokenizer is to keep, see `codes.read_used_codes`.
    Raises: UsageError when `folder` holds files or `codes` come with a denoiser; CheckpointError when the checkpoint is
    damaged, of another network or put together wrongly.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"expected a new or empty folder to write to, {folder} holds files: choose another name")
    also: PartName | None = None
    if _is_our_tokenizer(checkpoint):
        if codes is None:
            raise UsageError(f"expected a checkpoint to convert, {checkpoint} is ours already: use it, or add --codes")
        weights, made = checkpoint / WEIGHTS_FILE, _our_tokenizer(checkpoint)
    else:
        source = find_source(checkpoint, part)
        weights = source.weights
        made, also = _read(source, part, _Untold(heads=heads, image_size=image_size or IMAGE_SIZE, product=product))
    if codes is not None:
        made = _keep(made, codes)
    return _write(made, folder, weights, also)


def _read(source: Source, part: PartName | None, untold: _Untold) -> tuple[_Part, PartName | None]:
    """The part in a checkpoint, and the name of the other one when there is one."""
    tensors = read_tensors(source.weights)
    transformer = vq_diffusion.find(tensors) if part != "tokenizer" else None
    tokenizer = taming.find(tensors) if part != "denoiser" else None
    if transformer is not None:
        return _denoiser(transformer, source, untold), "tokenizer" if tokenizer or "tokenizer" in source.parts else None
    if tokenizer is not None:
        return _tokenizer(tokenizer, untold), None
    wanted = {"denoiser": f"transformer ({vq_diffusion.ANCHOR})", "tokenizer": f"tokenizer ({taming.ANCHOR})"}
    raise CheckpointError(
        f"expected VQ-Diffusion's {' or '.join(wanted[one] for one in wanted if part in (None, one))}, {source.weights} holds "
        f"{len(tensors)} other tensors ({some(list(tensors))}): see docs/converting.md for what can be converted"
    )


def _denoiser(found: vq_diffusion.Found, source: Source, untold: _Untold) -> _Part:
    asked = untold.heads or source.heads or vq_diffusion.HEADS
    config = vq_diffusion.denoiser_config(found, heads=asked, sigmoid_gelu=source.sigmoid_gelu)
    schedule = vq_diffusion.schedule_of(found, config)
    null = found.null if source.null is None else read_tensors(source.null).get("embeddings")
    if null is not None and (null.shape[1:] != (config.condition_dim,) or not null.isfinite().all()):
        raise CheckpointError(
            f"expected a null condition of finite {config.condition_dim}-d slots, got {list(null.shape)}: "
            "download the checkpoint again"
        )
    return _Part(
        kind="denoiser",
        recognized=found.layout,
        config=config,
        weights=vq_diffusion.denoiser_weights(found, config),
        facts={"schedule": to_dict(schedule), "reads": "text"},
        beside={} if null is None else {NULL_FILE: {"y": null.float()}},
    )


def _tokenizer(found: taming.Found, untold: _Untold) -> _Part:
    config = taming.tokenizer_config(found, image_size=untold.image_size, product=untold.product)
    weights = taming.tokenizer_weights(found)
    name = found.layout + (", averaged weights" if found.averaged else "")
    return _Part(kind="taming-tokenizer", recognized=name, config=config, weights=weights)


def _is_our_tokenizer(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and read_facts(folder / CONFIG_FILE).get("kind") in KINDS


def _our_tokenizer(folder: Path) -> _Part:
    kind, part = load_tokenizer_part(folder)
    beside = {CODES_FILE: read_tensors(folder / CODES_FILE)} if (folder / CODES_FILE).is_file() else {}
    return _Part(
        kind=kind, recognized="knn-diffusion", config=part.config, weights=part.weights, facts=part.extra, beside=beside
    )


def _keep(made: _Part, file: Path) -> _Part:
    """The same tokenizer with the codes that a file lists, and the list beside it."""
    if made.kind not in KINDS:
        raise UsageError("expected a tokenizer to keep some codes of, got a denoiser: leave out --codes, or add --part")
    before: Any = made.config
    used = read_used_codes(file, before.vocab_size)
    config, weights = keep(before, made.weights, used)
    original = made.beside[CODES_FILE]["used"][used] if CODES_FILE in made.beside else used
    recognized = f"{made.recognized}, {len(used):,} of {before.vocab_size:,} codes"
    return replace(made, recognized=recognized, config=config, weights=weights, beside={CODES_FILE: {"used": original}})


def _write(part: _Part, folder: Path, weights: Path, also: PartName | None) -> Conversion:
    made = Conversion(
        part=part.kind,
        recognized=part.recognized,
        parameters=sum(tensor.numel() for tensor in part.weights.values()),
        source=weights.name,
        sha256=file_digest(weights),
        null=NULL_FILE in part.beside,
        also=also,
    )
    with atomic_folder(folder) as temporary:
        before = {"before": part.facts["origin"]} if "origin" in part.facts else {}
        facts = {**part.facts, "origin": {**made.to_dict(), **before}}
        save_part(temporary, kind=part.kind, config=part.config, weights=part.weights, extra=facts)
        for name, tensors in part.beside.items():
            save_weights(temporary / name, tensors)
        atomic_write_bytes(temporary / "README.md", card(made).encode())
    return made


def card(made: Conversion) -> str:
    """A line of Markdown that says where the weights are from."""
    return (
        f"A {made.part} for knn-diffusion, converted from `{made.source}` (SHA-256 `{made.sha256}`) in the layout of "
        f"{made.recognized}. Its license is that of the original.\n"
    )
