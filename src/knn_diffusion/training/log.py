"""What a training run writes down: metrics.jsonl always, previews as PNG, TensorBoard when it is installed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from knn_diffusion.checkpoint import atomic_write_bytes

Log = Callable[[Mapping[str, float | int], Image.Image | None], None]
"""Writes down one line of figures, its `step` among them, and a picture if there is one."""


@contextmanager
def open_log(output: Path, step: int) -> Iterator[Log]:
    """Open the log of the run under `output`, which goes on after `step`; lines of later steps are dropped."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "metrics.jsonl"
    _forget_after(path, step)
    board = _tensorboard(output / "tensorboard", step)
    with path.open("a", encoding="utf-8") as lines:

        def log(metrics: Mapping[str, float | int], preview: Image.Image | None) -> None:
            reached = int(metrics["step"])
            lines.write(json.dumps(metrics) + "\n")
            lines.flush()
            if board is not None:
                for name, value in metrics.items():
                    board.add_scalar(name, value, reached)  # type: ignore[attr-defined]
            if preview is not None:
                (output / "previews").mkdir(exist_ok=True)
                preview.save(output / "previews" / f"step-{reached:07d}.png")

        yield log
    if board is not None:
        board.close()  # type: ignore[attr-defined]


def _forget_after(path: Path, step: int) -> None:
    """Drop log lines of steps that a resumed run will do again, and one that a crash cut short."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = (line + "\n" for line in lines if (logged := _logged_step(line)) is not None and logged <= step)
        atomic_write_bytes(path, "".join(kept).encode())


def _logged_step(line: str) -> int | None:
    """The step a line of metrics.jsonl tells of, None when it is no whole line."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _tensorboard(folder: Path, step: int) -> object | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
