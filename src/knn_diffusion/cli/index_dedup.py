"""`index dedup`: images that repeat others leave an index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knn_diffusion.cli.index import IndexArgument
from knn_diffusion.cli.terminal import JsonOption, answer, progress
from knn_diffusion.errors import StoreError

if TYPE_CHECKING:
    from knn_diffusion.image_index.near_duplicates import NearDuplicateReport

GROUPS_TOLD = 5


def dedup(
    index: IndexArgument,
    *,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold", help="Least cosine of a copy; default: stricter than for neighbors.", show_default=False
        ),
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Remove the copies; else they are only reported.")] = False,
    table: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Every copy as a line of JSON.", show_default=False)
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Draw the largest groups.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find images that show the same picture as one added before them, and remove them when told to.

    Example: knn-diffusion index dedup my-index --picture copies.png
    """
    from knn_diffusion.image_index import ImageIndex

    with ImageIndex.open(index) as opened, progress() as show:
        if apply and opened.read_only:
            raise StoreError(f"expected an index that can be changed, {index} is read-only: leave --apply out")
        found = opened.dedup(threshold, progress=show)
        if table is not None:
            found.write_table(table)
        if picture is not None and found.copies:
            found.write_picture(picture, opened.preview)
        if apply:
            opened.remove([copy.id for copy in found.copies])
            found = replace(found, removed=True)
        answer(_result(found), as_json, lambda: _lines(found, index))


def _result(found: NearDuplicateReport) -> dict[str, object]:
    groups = [
        {"kept": group[0].kept_id, "source": group[0].kept_source, "copies": [asdict(copy) for copy in group]}
        for group in found.groups[:GROUPS_TOLD]
    ]
    return {
        "images": found.images,
        "copies": len(found.copies),
        "groups": len(found.groups),
        "threshold": found.rule.threshold,
        "manhattan": found.rule.manhattan,
        "every_pair": found.exact,
        "removed": found.removed,
        "largest": groups,
    }


def _lines(found: NearDuplicateReport, index: str) -> Iterator[str]:
    rule = f"cosine at least {found.rule.threshold:g}, 8×8 pictures within {found.rule.manhattan:g} levels"
    others = f"{len(found.groups):,} others" if found.copies else "others"
    yield f"{len(found.copies):,} of {found.images:,} images repeat {others} ({rule})"
    for group in found.groups[:GROUPS_TOLD]:
        yield f"  {group[0].kept_source} stays for {len(group):,}, such as {group[0].source} ({group[0].cosine:.4f})"
    if found.removed:
        yield f"they are removed; knn-diffusion index compact {index} takes them off the disk"
    elif found.copies:
        yield "nothing is removed: look at some with --picture FILE, then give --apply"
