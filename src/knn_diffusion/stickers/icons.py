"""Icon packages to sticker art: SVG bodies to transparent pictures.

A package is an unpacked `@iconify-json/NAME`: `icons.json` holds the bodies and sizes, `info.json` author and licence.
"""

from __future__ import annotations

import functools
import io
import json
import multiprocessing
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from knn_diffusion.errors import MissingDependencyError, UsageError
from knn_diffusion.progress import Progress

SIDE = 256
CHUNK = 50
_BOX = {"left": 0, "top": 0, "width": 16, "height": 16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Icon:
    """One drawing of a package: its name there, its SVG body, and the box of user units that it fills."""

    name: str
    body: str
    left: float
    top: float
    width: float
    height: float

    @property
    def svg(self) -> str:
        """The drawing as a complete SVG document."""
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{self.left:g} {self.top:g} {self.width:g} {self.height:g}" width="{self.width:g}" height="{self.height:g}">'
            f"{self.body}</svg>"
        )


def read_package(folder: str | Path) -> dict[str, Icon]:
    """The drawings of an unpacked icon package by name.

    Raises: UsageError when the folder holds no icon package.
    """
    place = Path(folder) / "icons.json"
    try:
        content: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
        icons = content["icons"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"expected an unpacked icon package with icons.json, cannot read {place} ({error}): run recipes/fetch_art.py"
        ) from None
    return {
        name: Icon(
            name=name,
            body=entry["body"],
            **{key: float(entry.get(key, content.get(key, default))) for key, default in _BOX.items()},
        )
        for name, entry in icons.items()
    }


def render_svg(svg: str, side: int = SIDE) -> Image.Image:
    """An SVG document as a transparent picture (RGBA), `side` pixels wide.

    Raises: MissingDependencyError without resvg.
    """
    try:
        import resvg_py
    except ImportError:
        raise MissingDependencyError("drawing SVG art needs resvg: pip install 'knn-diffusion[stickers]'") from None
    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png)), formats=("PNG",)).convert("RGBA")  # noqa: TID251


def _render_chunk(icons: Sequence[Icon], folder: Path) -> int:
    for icon in icons:
        path = folder / f"{icon.name}.png"
        if not path.exists():
            unfinished = path.with_suffix(".part")
            render_svg(icon.svg).save(unfinished, format="PNG")
            unfinished.replace(path)
    return len(icons)


def render_package(
    package: str | Path,
    folder: str | Path,
    names: Iterable[str] | None = None,
    *,
    processes: int = 1,
    progress: Progress | None = None,
) -> Path:
    """Draw what is not drawn yet of an icon package as `folder/NAME.png`, the package's `info.json` (licence) beside it.

    Args: names: the icons to draw, by default all; processes: more than one needs a main module that other processes
        can import.
    """
    icons = read_package(package)
    chosen = [icons[name] for name in (icons if names is None else names)]
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    (place / "info.json").write_bytes((Path(package) / "info.json").read_bytes())
    chunks = [chosen[start : start + CHUNK] for start in range(0, len(chosen), CHUNK)]
    work = functools.partial(_render_chunk, folder=place)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = 0
        for count in pool.map(work, chunks) if processes > 1 else map(work, chunks):
            done += count
            if progress is not None:
                progress(f"drawing {place.name}", done, len(chosen))
    return place
