"""`index import | export`: embeddings from other tools, and for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from knn_diffusion.cli.index import SKIPPED_SHOWN, IndexArgument
from knn_diffusion.cli.terminal import JsonOption, answer, progress, say


class Format(StrEnum):
    """Layouts of an exported folder."""

    CLIP_RETRIEVAL = "clip-retrieval"
    NPY = "npy"


def register(app: typer.Typer) -> None:
    """Add the commands to `index`."""
    app.command("import")(import_embeddings)
    app.command("export")(export)


def import_embeddings(
    source: Annotated[
        list[str], typer.Argument(metavar="SOURCE...", help="clip-retrieval folder, or .npy files.", show_default=False)
    ],
    *,
    output: Annotated[
        Path, typer.Option("--output", help="Folder of the index, new or to add to.", show_default=False)
    ],
    encoder: Annotated[
        str | None, typer.Option("--encoder", help="What made them: name, folder or owner/name on the hub.")
    ] = None,
    encoder_name: Annotated[
        str | None, typer.Option("--encoder-name", help="Its name, when it is not at hand.")
    ] = None,
    dim: Annotated[int | None, typer.Option("--dim", min=1, help="Width the embeddings must have.")] = None,
    ids: Annotated[Path | None, typer.Option("--ids", help=".txt, an id a line, or .npy.", show_default=False)] = None,
    provenance: Annotated[
        Path | None, typer.Option("--provenance", help="A .parquet or .jsonl row for each vector.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make an index of embeddings computed elsewhere; interrupted, the same command goes on where it stopped.

    Example: knn-diffusion index import laion-embeddings --output my-index --encoder path/to/clip-vit-base-patch32
    """
    from knn_diffusion.image_index import ImageIndex

    with progress() as show:
        made = ImageIndex.import_embeddings(
            [*source], output, encoder, encoder_name=encoder_name, dim=dim, ids=ids, provenance=provenance, progress=show
        )  # fmt: skip
    report = made.import_report
    assert report is not None
    for one in report.skipped[:SKIPPED_SHOWN]:
        say(" ".join(f"skipped {one.source}: {one.reason}".split()))
    if report.num_skipped > SKIPPED_SHOWN:
        say(f"skipped {report.num_skipped - SKIPPED_SHOWN:,} more: {dict(report.reasons)}")

    def lines() -> Iterator[str]:
        if report.resumed_at:
            yield f"went on at row {report.resumed_at:,} of {report.rows:,}"
        yield f"added {report.added:,}, present before {report.already_present:,}, skipped {report.num_skipped:,}"
        yield f"{len(made):,} images in {output}"

    answer({**asdict(report), "index": str(output.absolute()), "count": len(made)}, as_json, lines)


def export(
    index: IndexArgument,
    *,
    output: Annotated[Path, typer.Option("--output", help="New folder.", show_default=False)],
    layout: Annotated[Format, typer.Option("--format", help="Files to write.")] = Format.CLIP_RETRIEVAL,
    faiss: Annotated[bool, typer.Option("--faiss", help="Also write image.index for faiss.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write ids, provenance and embeddings into files that other tools read.

    Example: knn-diffusion index export stickers --output sticker-embeddings --faiss
    """
    from knn_diffusion.image_index import ImageIndex

    with progress() as show, ImageIndex.open(index, read_only=True) as opened:
        report = opened.export(output, layout=layout.value, faiss=faiss, progress=show)
    with_index = f" and a faiss index ({report.faiss})" if report.faiss else ""
    line = f"wrote {report.count:,} embeddings of {report.dim} numbers{with_index} to {output}"
    answer(asdict(report), as_json, lambda: iter([line]))
