"""`index tune | report`: how far queries look, and what they find at what cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knn_diffusion.cli.index import IndexArgument
from knn_diffusion.cli.terminal import JsonOption, answer, progress, say

if TYPE_CHECKING:
    from knn_diffusion.image_index.tuning import Tuned

TextsOption = Annotated[
    Path | None,
    typer.Option("--texts", metavar="FILE", help="Queries as users will ask them, one a line.", show_default=False),
]
KOption = Annotated[int, typer.Option("-k", help="Neighbors whose recall counts.")]
SampleOption = Annotated[int, typer.Option("--sample", help="Images of the index to measure on.")]


def tune(
    index: IndexArgument,
    *,
    texts: TextsOption = None,
    target: Annotated[float, typer.Option("--recall", help="Share of the nearest images to find.")] = 0.95,
    k: KOption = 10,
    sample: SampleOption = 500,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="First train the cells anew, on the images there are now.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Find how far queries must look for a given recall, and keep that with the index.

    Example: knn-diffusion index tune my-index --texts queries.txt --recall 0.95
    """
    from knn_diffusion.image_index import ImageIndex
    from knn_diffusion.image_index.tuning import read_texts, usable_texts
    from knn_diffusion.image_index.tuning import tune as tuned

    lines, opened = read_texts(texts) if texts is not None else [], ImageIndex.open(index)
    queries = usable_texts(opened, lines, say)
    with progress() as show:
        found = tuned(opened, queries, target=target, k=k, sample=sample, retrain=retrain, progress=show)
    answer({"tuned": [asdict(one) for one in found]}, as_json, lambda: _lines(found, target))


def report(
    index: IndexArgument,
    *,
    texts: TextsOption = None,
    k: KOption = 10,
    sample: SampleOption = 500,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw it into a PNG, SVG or PDF too.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what an index finds at what cost, for images, texts and what came after growth; changes nothing.

    Example: knn-diffusion index report my-index --texts queries.txt --plot recall.png
    """
    from knn_diffusion.image_index import ImageIndex
    from knn_diffusion.image_index.tuning import read_texts, require_plot, usable_texts
    from knn_diffusion.image_index.tuning import report as measured

    if plot is not None:
        require_plot(plot)
    lines, opened = read_texts(texts) if texts is not None else [], ImageIndex.open(index, read_only=True)
    queries = usable_texts(opened, lines, say)
    with progress() as show:
        found = measured(opened, queries, k=k, sample=sample, progress=show)
    if plot is not None:
        found.plot(plot)
    answer(found.to_dict(), as_json, lambda: iter(found.to_markdown().splitlines()))


def _lines(found: list[Tuned], target: float) -> Iterator[str]:
    for one in found:
        reach = one.chosen.reach
        short = "" if one.met else f", less than the {target:.3f} asked for: no reach gives more"
        yield (
            f"{one.modality} queries: {reach.probes} cells, depth {reach.depth}: recall {one.chosen.recall:.3f}, "
            f"{one.chosen.milliseconds:.2f} ms{short}"
        )
