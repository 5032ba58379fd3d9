"""`index dedup`: images that repeat others are shown, and removed when asked to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knn_diffusion.cli.index import IndexArgument, changeable
from knn_diffusion.cli.terminal import JsonOption, answer, progress, require_png, say

if TYPE_CHECKING:
    from knn_diffusion.image_index import DedupReport, ImageIndex
    from knn_diffusion.image_index.dedup import Group

GROUPS_SHOWN = 10
PICTURED_COPIES = 7


def dedup(
    index: IndexArgument,
    *,
    threshold: Annotated[
        float | None,
        typer.Option("--threshold", metavar="COSINE", help="Least cosine of a copy; default: by the index, ≥ 0.95."),
    ] = None,
    manhattan: Annotated[
        float | None,
        typer.Option("--manhattan", metavar="LEVELS", help="Most that its 8×8 picture differs, of 255; default: 2."),
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Remove the copies; without it nothing is changed.")] = False,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="Write all copies, .csv or .jsonl.", show_default=False),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", metavar="FILE", help="Draw the largest groups into a PNG.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find images that repeat an earlier one of the index, and remove them with --apply.

    Example: knn-diffusion index dedup my-index --report copies.csv --picture copies.png
    """
    from knn_diffusion.image_index import ImageIndex
    from knn_diffusion.image_index.dedup import require_table

    if report is not None:
        require_table(report)
    if picture is not None:
        require_png(picture)
    with changeable(index) if apply else ImageIndex.open(index, read_only=True) as opened, progress() as show:
        found = opened.dedup(threshold=threshold, manhattan=manhattan, progress=show)
        groups = found.groups(GROUPS_SHOWN, PICTURED_COPIES)
        if report is not None:
            found.write(report)
        if picture is not None:
            _draw(opened, groups, picture)
        if apply:
            found.remove()
    shown = [asdict(group) for group in groups]
    result = {**found.to_dict(), "removed": found.num_copies if apply else 0, "largest": shown}
    answer(result, as_json, lambda: _lines(found, groups, apply))


def _lines(found: DedupReport, groups: list[Group], removed: bool) -> Iterator[str]:
    for group in groups:
        yield f"{group.kept}  {group.source}"
        for copy in group.copies:
            yield f"  {copy.cosine:.4f}  {copy.id}  {copy.source}"
        if group.size > len(group.copies):
            yield f"  and {group.size - len(group.copies):,} more"
    if found.num_groups > len(groups):
        yield f"and {found.num_groups - len(groups):,} more groups"
    rule = f"cosine ≥ {found.rule.threshold:g}, pictures within {found.rule.manhattan:g} levels"
    verb = "removed" if removed else "would remove"
    yield f"{verb} {found.num_copies:,} of {found.count:,} images, copies of {found.num_groups:,} that stay ({rule})"
    if found.num_copies:
        yield "index compact takes them off the disk" if removed else "--apply removes them"


def _draw(index: ImageIndex, groups: list[Group], path: Path) -> None:
    """A row for each group: the image that stays, then those that go; blank where the index has no previews."""
    from knn_diffusion.cli.sheet import BLANK, Block, contact_sheet, short_name
    from knn_diffusion.images import save_png

    if not groups:
        say("no image repeats another: no picture was drawn")
        return
    rows: list[list[Block]] = []
    for group in groups:
        stays = (f"stays: {short_name(group.source)}", index.preview(group.kept) or BLANK)
        goes = [
            (f"{copy.cosine:.4f} {short_name(copy.source)}", index.preview(copy.id) or BLANK) for copy in group.copies
        ]
        rows.append([[stays], goes])
    save_png(contact_sheet(rows), path)
