"""New files in a folder that other runs may be adding to as well: each gets a free name, nothing is overwritten."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

from knn_diffusion.checkpoint import write_new_bytes

_NUMBERED = re.compile(r"(\d{3,9})-.*-\d+\.\w+$")


def add_file(folder: Path, name: str, content: bytes) -> Path:
    """Write `sheet.png`, or `sheet-2.png`, … where that name is taken.

    Raises: KnnDiffusionError when the disk is full or not writable.
    """
    path = folder / name
    for number in itertools.count(2):
        if write_new_bytes(path, content):
            break
        path = folder / f"{Path(name).stem}-{number}{Path(name).suffix}"
    return path


class NumberedFiles:
    """The images of one prompt as `007-a-red-heart-0.png`, `007-a-red-heart-1.png`, …: the number is the folder's next.

    Two runs that begin at the same moment with the same prompt get different numbers: the first image takes the number.
    """

    def __init__(self, folder: Path, prompt: str) -> None:
        self.folder, self.slug = folder, slug(prompt)
        self._number: int | None = None

    def add(self, image: int, suffix: str, content: bytes) -> Path:
        """Write one image, counted from 0 within the prompt, and return where it lies.

        Raises: KnnDiffusionError when the disk is full or not writable.
        """
        while True:
            if self._number is None:
                self._number = _next_number(self.folder)
            path = self.folder / f"{self._number:03d}-{self.slug}-{image}{suffix}"
            if write_new_bytes(path, content):
                return path
            self._number = None


def slug(prompt: str) -> str:
    """A prompt as part of a file name: lower-case words joined by hyphens, at most 40 characters."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")
    return words[:40].strip("-") or "prompt"


def _next_number(folder: Path) -> int:
    numbers = [int(found[1]) for path in folder.glob("*-*") if (found := _NUMBERED.match(path.name))]
    return max(numbers, default=-1) + 1
