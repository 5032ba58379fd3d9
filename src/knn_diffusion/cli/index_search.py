"""`index search`: the images nearest to a text or to an image, as lines, JSON or a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knn_diffusion.cli.index import IndexArgument
from knn_diffusion.cli.terminal import JsonOption, answer, require_png, say
from knn_diffusion.errors import UsageError

if TYPE_CHECKING:
    from knn_diffusion.image_index import ImageIndex

SEARCHED = 10
COLUMNS = 5


def search(
    index: IndexArgument,
    *,
    text: Annotated[str | None, typer.Option("--text", help="Find images that fit this text.")] = None,
    image: Annotated[Path | None, typer.Option("--image", help="Find images that look like this one.")] = None,
    k: Annotated[int | None, typer.Option("-k", help="How many.", show_default=f"{SEARCHED}, or all there are")] = None,
    where: Annotated[
        str | None, typer.Option("--where", metavar="CONDITION", help='Only those, such as "width >= 512".')
    ] = None,
    picture: Annotated[
        Path | None, typer.Option("--picture", metavar="FILE", help="Draw them into a PNG.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Find the images nearest to a text or to an image.

    Example: knn-diffusion index search stickers --text "a puppy" -k 5 --where "source LIKE '%dog%'"
    """
    from knn_diffusion.image_index import ImageIndex

    if (text is None) == (image is None):
        raise UsageError("expected --text or --image, exactly one of them: name what to search by")
    if picture is not None:
        require_png(picture)
    opened = ImageIndex.open(index, read_only=True)
    if k is None:
        k = max(1, min(SEARCHED, len(opened)))
        if k < SEARCHED and not as_json:
            say(f"the index holds {len(opened)} images: -k is {k}, not {SEARCHED}")
    if text is not None:
        found = opened.search_text(text, k, where=where)
    else:
        assert image is not None
        found = opened.search_image(image, k, where=where)
    ids = [one for one in found.ids[0] if one]
    neighbors: list[dict[str, Any]] = [
        {"id": one, "score": round(float(score), 6), "source": source, **({"metadata": facts} if facts else {})}
        for one, score, source, facts in zip(
            ids, found.scores[0], opened.sources(ids), opened.metadata(ids), strict=False
        )
    ]
    result = {
        "query": text if text is not None else str(image),
        "neighbors": neighbors,
        "shortfall": int(found.shortfall[0]),
    }
    if result["shortfall"] and not as_json:
        others = "copies of these" if where is None else "left out by --where, or copies of these"
        say(f"found {len(neighbors)} of the {k} asked for: all others are {others}")
    if picture is not None:
        _draw(opened, neighbors, picture)
    answer(result, as_json, lambda: (f"{one['score']:.3f}  {one['id']}  {one['source']}" for one in neighbors))


def _draw(index: ImageIndex, neighbors: list[dict[str, Any]], path: Path) -> None:
    """The neighbors row by row, best first; blank where the index has no previews."""
    from knn_diffusion.cli.sheet import BLANK, CELL, short_name
    from knn_diffusion.images import grid, save_png

    if not neighbors:
        say("nothing was found: no picture was drawn")
        return
    labels = [f"{one['score']:.3f} {short_name(one['source'])}" for one in neighbors]
    shown = [index.preview(one["id"]) or BLANK for one in neighbors]
    save_png(grid(shown, columns=min(COLUMNS, len(shown)), cell=CELL, labels=labels), path)
