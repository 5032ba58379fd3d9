"""The contact sheet: for each prompt one row, what was retrieved and what was drawn from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePath

from PIL import Image

from knn_diffusion.images import Finish, finished, grid
from knn_diffusion.pipeline import KnnDiffusion
from knn_diffusion.request import Output

Block = list[tuple[str, Image.Image]]
"""Pictures that stand together, each with its label."""

CELL = 128
BLANK = Image.new("RGB", (1, 1), "white")


def retrieved(pipe: KnnDiffusion, output: Output) -> Block:
    """The neighbors of an output, as the index keeps them; blank where it was built without previews."""
    return [(short_name(one.source), pipe.index.preview(one.id) or BLANK) for one in output.neighbors]


def drawn(output: Output, label: str | None = None, finish: Finish | None = None) -> Block:
    """The images of an output, the first labelled with the prompt; finished as their files are, at the size of a cell."""
    text = output.prompt if label is None else label
    images = output.images
    if finish is not None and not finish.plain:
        images = [finished(image, replace(finish, size=CELL)) for image in images]
    return [(text if number == 0 else "", image) for number, image in enumerate(images)]


def contact_sheet(rows: Sequence[Sequence[Block]], cell: int = CELL) -> Image.Image:
    """Rows of blocks under each other, the blocks of a column aligned and an empty cell between columns."""
    empty = ("", BLANK)
    widths = [max(len(block) for block in column) for column in zip(*rows, strict=True)]
    cells: Block = []
    for row in rows:
        for block, width in zip(row, widths, strict=True):
            cells += block + [empty] * (width - len(block) + 1)
        cells.pop()
    columns = sum(widths) + len(widths) - 1
    return grid([picture for _, picture in cells], columns=columns, cell=cell, labels=[label for label, _ in cells])


def short_name(source: str) -> str:
    """A source as a label: the last part of its path, without suffix or dashes."""
    return PurePath(source.rpartition("::")[2] or source).stem.replace("-", " ").replace("_", " ")
