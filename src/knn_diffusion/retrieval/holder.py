"""Who is writing: a note that a writer lays beside the database for as long as its transaction lasts.

SQLite's lock is the truth about whether somebody writes; the note only lets a message name the process. A note that a
killed process left is no obstacle.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

NOTE = "writer.json"
COMMAND_LENGTH = 120
CURE = "wait until it has finished"


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """The process that writes, since when, and how it was started."""

    pid: int
    host: str
    since: str
    command: str

    @classmethod
    def this(cls) -> Holder:
        """This process."""
        command = " ".join(shlex.join(sys.argv).split())[:COMMAND_LENGTH]
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        return cls(pid=os.getpid(), host=socket.gethostname(), since=now, command=command)

    def gone(self) -> bool:
        """Whether the process is known to have ended; never of another machine's."""
        if self.host != socket.gethostname() or os.name == "nt":
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


@contextmanager
def noted(folder: Path | None) -> Iterator[None]:
    """Say that this process writes until the block ends; where that cannot be written it is left unsaid."""
    if folder is None:
        yield
        return
    with suppress(OSError):
        (folder / NOTE).unlink(missing_ok=True)
        with (folder / NOTE).open("x", encoding="utf-8") as note:  # which follows no link that somebody laid there
            note.write(json.dumps(asdict(Holder.this())))
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / NOTE).unlink()


def holder(folder: Path | None) -> str:
    """The end of a sentence: by whom a folder is in use, and what to do about it."""
    try:
        known = Holder(**json.loads((folder / NOTE).read_text(encoding="utf-8"))) if folder is not None else None
        if known is None or known.gone():
            return f": {CURE}"
    except (OSError, ValueError, TypeError, OverflowError):
        return f": {CURE}"
    who = f"process {known.pid} on {known.host} since {known.since} ({known.command})"
    return f", {who}: {CURE}, or end that process: what it has saved is kept"
