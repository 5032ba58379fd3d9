"""What a command shows: progress bars on a terminal, one JSON object on request, all else on standard error."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from knn_diffusion.errors import KnnDiffusionError, UsageError
from knn_diffusion.progress import Progress

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]

QUIET_SECONDS = 30.0
"""Where no bar can be drawn, long work says a line at most so often."""


_JOINERS = "\u200c\u200d"
"""Invisible characters that belong to words and emoji; all others of their kind could rewrite the terminal or a line."""


def shown(line: str) -> str:
    """One line as a terminal may have it: names of other people's files can hold line breaks and control sequences."""
    kinds = ("Cc", "Cf", "Zl", "Zp")
    return "".join("?" if unicodedata.category(one) in kinds and one not in _JOINERS else one for one in line)


def say(message: str) -> None:
    """A line for people, on standard error."""
    _echo(shown(message), sys.stderr)


def answer(result: Mapping[str, Any], as_json: bool, lines: Callable[[], Iterator[str]]) -> None:
    """Print a command's result on standard output: the JSON object, or lines for people."""
    if as_json:
        typer.echo(json.dumps(result))  # ASCII: whatever the terminal's encoding, and for file names in none
        return
    for line in lines():
        _echo(shown(line), sys.stdout)


def _echo(line: str, stream: Any) -> None:
    """The line, with what the stream's encoding cannot hold as escapes: file names need not be valid texts."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    typer.echo(line.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def open_missing_streams() -> None:
    """Give a process without standard output or error (services, `2>&-`, pythonw) ones that lead nowhere.

    Their numbers are taken too, so that no file opened later is mistaken for them.
    """
    if sys.stdout is not None and sys.stderr is not None:
        return
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stdout, sys.stderr = sys.stdout or _nowhere(), sys.stderr or _nowhere()


@cache
def _nowhere() -> TextIO:
    """Open until the process ends."""
    return open(os.devnull, "w", encoding="utf-8")


@contextmanager
def progress() -> Iterator[Progress]:
    """A callback that draws progress bars on a terminal and does nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(shown(what), total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show


def require_png(path: Path) -> None:
    """Raise UsageError for a picture's name that is none of a PNG; worth asking before the work."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"expected a .png file for the picture, got {path}: change its name")


def seldom() -> Callable[[], bool]:
    """Whether it is time for a line: never on a terminal, which has bars, elsewhere once in `QUIET_SECONDS`."""
    said = [time.monotonic()]

    def due() -> bool:
        if sys.stderr.isatty() or time.monotonic() - said[0] < QUIET_SECONDS:
            return False
        said[0] = time.monotonic()
        return True

    return due


def new_folder(asked: Path | None) -> Path:
    """The folder to write into: the one asked for, or the first free of output, output-2, …

    Raises: UsageError when the one asked for holds files or is one.
    """
    if asked is None:
        names = (Path("output" if number == 1 else f"output-{number}") for number in range(1, 1_000_000))
        return next(path for path in names if not path.exists()).absolute()
    if asked.exists() and (not asked.is_dir() or any(asked.iterdir())):
        raise UsageError(f"expected a new or empty folder for --output, {asked} holds files: choose another name")
    return asked.absolute()


@contextmanager
def growing_folder(asked: Path | None) -> Iterator[Path]:
    """The folder to add files to, made if need be: the one asked for, or output. One that got none in the end goes again.

    Raises: UsageError when it is a file; KnnDiffusionError when nothing can be written there, before any work is done.
    """
    folder = (asked or Path("output")).absolute()
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"expected a folder for --output, {folder} is a file: choose another name")
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise KnnDiffusionError(
            f"expected a folder that can be written to, {folder} cannot ({error.strerror}): choose another --output"
        ) from None
    try:
        yield folder
    finally:
        if made:
            with suppress(OSError):  # it holds files, as it should
                folder.rmdir()
