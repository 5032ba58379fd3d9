"""`index remove | sync`: images leave an index by id, place or condition, and it follows its folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knn_diffusion.cli.index import IndexArgument, MetadataOption, changeable
from knn_diffusion.cli.terminal import JsonOption, answer, progress, say
from knn_diffusion.errors import UsageError

if TYPE_CHECKING:
    from knn_diffusion.image_index.sync import SyncPlan

SHOWN = 10


def remove(
    index: IndexArgument,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID...]", help="Ids as a search shows them.", show_default=False)
    ] = None,
    *,
    source: Annotated[
        list[str] | None,
        typer.Option("--source", metavar="PATH", help="All that came from this file, folder or shard; repeatable."),
    ] = None,
    where: Annotated[
        str | None, typer.Option("--where", metavar="CONDITION", help='All of these, such as "punsafe > 0.9".')
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say how many, and remove none.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Remove images from an index; the next search does not find them.

    Example: knn-diffusion index remove my-index --source photos/2019 --dry-run
    """
    if not ids and not source and where is None:
        raise UsageError("expected ids, --source or --where, got none: say what to remove")
    with changeable(index) as opened:
        wanted = dict.fromkeys(ids or [])
        for place in source or []:
            found = opened.ids_from(place)
            if not found:
                raise UsageError(f"expected a source of images in {index}, none came from {place}: see index search")
            wanted |= dict.fromkeys(found)
        if where is not None:
            wanted |= dict.fromkeys(opened.ids_where(where))
        opened.sources(list(wanted))  # an unknown id is an error
        if wanted and not dry_run:
            opened.remove(list(wanted))
        result = {"removed": 0 if dry_run else len(wanted), "found": len(wanted), "count": len(opened)}
    line = f"removed {len(wanted):,}, {result['count']:,} images are left"
    answer(result, as_json, lambda: iter([f"would remove {len(wanted):,}" if dry_run else line]))


def sync(
    index: IndexArgument,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where its images come from.", show_default=False)],
    *,
    apply: Annotated[bool, typer.Option("--apply", help="Do it; without it nothing is changed.")] = False,
    metadata: MetadataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an index follow a folder: add what is new there, replace what changed, remove what is gone.

    Example: knn-diffusion index sync my-index photos --apply
    """
    with changeable(index) as opened, progress() as show:
        plan = opened.sync(folder, progress=show)
        report = plan.apply(metadata=metadata, progress=show) if apply else None
        count = len(opened)
    for one in report.skipped[:SHOWN] if report else []:
        say(" ".join(f"skipped {one.source}: {one.reason}".split()))
    answer({**plan.to_dict(), "applied": apply, "count": count}, as_json, lambda: _lines(plan, apply, count))


def _lines(plan: SyncPlan, applied: bool, count: int) -> Iterator[str]:
    for word, sources in plan.to_dict().items():
        yield from (f"{word:8}{source}" for source in sources[:SHOWN])
        if len(sources) > SHOWN:
            yield f"{word:8}and {len(sources) - SHOWN:,} more"
    verb = ("added", "replaced", "removed") if applied else ("would add", "replace", "remove")
    yield f"{verb[0]} {len(plan.new):,}, {verb[1]} {len(plan.changed):,}, {verb[2]} {len(plan.gone):,}; {count:,} images"
    if not applied and (plan.new or plan.changed or plan.gone):
        yield "--apply does it"
