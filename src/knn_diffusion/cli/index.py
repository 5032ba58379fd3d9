"""`index build | add | info | check`: the images a model retrieves from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knn_diffusion.cli.terminal import JsonOption, answer, progress, say
from knn_diffusion.errors import ImageError, KnnDiffusionError, StoreError, UsageError

if TYPE_CHECKING:
    from knn_diffusion.image_index import AddReport, ImageIndex, RayConfig, TokenOutput
    from knn_diffusion.retrieval.plan import Plan

SKIPPED_SHOWN = 10
UNFRAMED = "none, it was built before pictures were framed"

app = typer.Typer(help="Build, change and search the images a model retrieves from.")

IndexArgument = Annotated[
    str, typer.Argument(metavar="INDEX", help="Folder, bundled name or owner/name on the hub.", show_default=False)
]
ImagesArgument = Annotated[
    list[str], typer.Argument(metavar="IMAGES...", help="Folders, files, tar shards, parquet.", show_default=False)
]

MetadataOption = Annotated[
    list[str] | None,
    typer.Option("--metadata", metavar="FILE", help="Table of facts to filter by, .csv, .jsonl or .parquet."),
]
RayOption = Annotated[bool, typer.Option("--ray", help="Embed in many processes, with Ray.")]
RayAddressOption = Annotated[
    str | None, typer.Option("--ray-address", help="Ray cluster to work on, host:port; else this machine.")
]
RayGpusOption = Annotated[float, typer.Option("--ray-gpus", min=0, help="Share of a GPU for each process.")]
TokensOption = Annotated[Path | None, typer.Option("--tokens", help="Also tokenize for a training, into this folder.")]
TokenizerOption = Annotated[Path | None, typer.Option("--tokenizer", help="Folder of the tokenizer for --tokens.")]


@app.callback()
def index() -> None:
    """Build, change and search the images a model retrieves from."""


@app.command()
def build(
    images: ImagesArgument,
    *,
    output: Annotated[Path, typer.Option("--output", help="New folder for the index.", show_default=False)],
    encoder: Annotated[
        str, typer.Option("--encoder", help="Registered name, folder or owner/name on the hub.")
    ] = "stickers",
    metadata: MetadataOption = None,
    ray: RayOption = False,
    ray_address: RayAddressOption = None,
    ray_gpus: RayGpusOption = 0.0,
    tokens: TokensOption = None,
    tokenizer: TokenizerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Embed images into a new index; those that cannot be read are listed and left out.

    Example: knn-diffusion index build photos more.tar --output my-index --metadata photos/facts.csv
    """
    from knn_diffusion.image_index import ImageIndex

    spread, wanted = _spread(ray, ray_address, ray_gpus), _tokens(tokens, tokenizer)
    with progress() as show:
        made = ImageIndex.build(
            images, output, encoder, progress=show, announce=_announce, ray=spread, metadata=metadata, tokens=wanted
        )
    assert made.report is not None
    _tell(made.report, made, output, as_json)


@app.command()
def add(
    index: IndexArgument,
    images: ImagesArgument,
    *,
    metadata: MetadataOption = None,
    ray: RayOption = False,
    ray_address: RayAddressOption = None,
    ray_gpus: RayGpusOption = 0.0,
    tokens: TokensOption = None,
    tokenizer: TokenizerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add images to an index; the next search finds them, without any training.

    Example: knn-diffusion index add my-index new/*.png
    """
    opened, spread, wanted = changeable(index), _spread(ray, ray_address, ray_gpus), _tokens(tokens, tokenizer)
    with progress() as show:
        report = opened.add(images, progress=show, ray=spread, metadata=metadata, tokens=wanted)
    if report.skipped and not report.added and not report.already_present:
        first = report.skipped[0]
        raise ImageError(
            f"none of {len(report.skipped)} images could be used (first: {first.source}: {first.reason}): "
            "mend or replace them"
        )
    _tell(report, opened, Path(index), as_json)
    with suppress(KnnDiffusionError):  # only advice; what is wrong, a search says
        if (drift := opened.drift()) is not None and drift.worth_training:
            say(f"{drift}: knn-diffusion index tune {index} --retrain")


@app.command()
def info(index: IndexArgument, *, as_json: JsonOption = False) -> None:
    """Say how many images an index holds, which encoder made it, and how it is searched.

    Example: knn-diffusion index info stickers
    """
    from knn_diffusion.image_index import ImageIndex

    with ImageIndex.open(index) as opened:
        found = opened.info()

    def lines() -> Iterator[str]:
        size, rule, fixed = found["bytes"], found["dedup"], found["read_only"]
        yield from (f"{name}: {found[name]}" for name in ("count", "dim", "encoder", "fingerprint", "engine"))
        yield f"bytes: {size:,} ({readable(size)})"
        yield f"framing: {found['framing'] or UNFRAMED}"
        yield f"previews: {found['preview_side']} pixels"
        yield f"copies: {rule_in_words(rule['cosine'], rule['manhattan'])}"
        yield f"read_only: {fixed} ({'additions and removals are refused' if fixed else 'images can be added and removed'})"

    answer(found, as_json, lines)


def readable(size: int) -> str:
    """Bytes in the largest decimal unit of which there is one."""
    units = [(10**9, "GB"), (10**6, "MB"), (10**3, "kB")]
    return next((f"{size / unit:.1f} {name}" for unit, name in units if size >= unit), f"{size} bytes")


def rule_in_words(cosine: float | None, manhattan: float | None) -> str:
    """When two images of a list count as the same."""
    rules = [f"cosine above {cosine:g}"] if cosine is not None else []
    rules += [f"small pictures within {manhattan:g} levels"] if manhattan is not None else []
    return " or ".join(rules) or "never left out"


@app.command()
def check(index: IndexArgument, *, as_json: JsonOption = False) -> None:
    """Verify every digest of an index; exit code 0 only when it is sound.

    Example: knn-diffusion index check my-index
    """
    from knn_diffusion.image_index import ImageIndex

    opened = ImageIndex.open(index, read_only=True)
    opened.check()
    result = {"sound": True, "count": len(opened)}
    answer(result, as_json, lambda: iter([f"sound, {len(opened):,} images"]))


def _announce(plan: Plan) -> None:
    """What a large index will take; a small one takes nothing worth a line."""
    if plan.layout != "exact":
        say(str(plan))


def _spread(ray: bool, address: str | None, gpus: float) -> RayConfig | None:
    from knn_diffusion.image_index import RayConfig

    if not ray and (address or gpus):
        alone = "--ray-address" if address else "--ray-gpus"
        raise UsageError(f"expected --ray with {alone}, got {alone} alone: add --ray, or leave {alone} out")
    return RayConfig(address=address, gpus_per_worker=gpus) if ray else None


def _tokens(folder: Path | None, tokenizer: Path | None) -> TokenOutput | None:
    from knn_diffusion.image_index import TokenOutput

    if (folder is None) != (tokenizer is None):
        raise UsageError("expected --tokens and --tokenizer together, got one of them: name both, or neither")
    return TokenOutput(tokenizer, folder) if tokenizer is not None and folder is not None else None


def changeable(index: str) -> ImageIndex:
    """The index of that name, opened to be changed. Raises: StoreError when it is read-only."""
    from knn_diffusion.hub import is_hub_id
    from knn_diffusion.image_index import ImageIndex

    if is_hub_id(index):
        raise StoreError(
            f"expected an index that can be changed, got {index}, which is no folder here and on the hub not to be changed: "
            "check the path, or build one of your own (knn-diffusion index build)"
        )
    opened = ImageIndex.open(index)
    if opened.read_only:
        raise StoreError(
            f"expected an index that can be changed, {index} is read-only: build one of your own (knn-diffusion index build)"
        )
    return opened


def _tell(report: AddReport, index: ImageIndex, folder: Path, as_json: bool) -> None:
    from knn_diffusion.image_index.hints import HINTS

    result = {**asdict(report), "index": str(folder.absolute()), "count": len(index), "framing": index.framing}
    for one in report.skipped[:SKIPPED_SHOWN]:
        say(" ".join(f"skipped {one.source}: {one.reason}".split()))
    if len(report.skipped) > SKIPPED_SHOWN:
        say(f"skipped {len(report.skipped) - SKIPPED_SHOWN} more, see --json")
    for hint, hinted in report.hints.items():
        say(f"{HINTS[hint]}: {hinted.count:,} (first: {' '.join(hinted.first.split())})")
    if report.unmatched_rows:
        say(f"rows of metadata that tell of none of these images, or of several: {report.unmatched_rows:,}")
        for reason in report.unmatched_reasons:
            say(f"  {reason}")

    def lines() -> Iterator[str]:
        yield f"added {report.added:,}, present before {report.already_present:,}, skipped {len(report.skipped):,}"
        yield f"{len(index):,} images in {folder}, framing {index.framing or UNFRAMED}"

    answer(result, as_json, lines)
