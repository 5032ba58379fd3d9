"""How a training is run, as against what is trained: nothing here changes the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from knn_diffusion.progress import Progress
from knn_diffusion.training.data import Notice


@dataclass(frozen=True, kw_only=True, slots=True)
class StepProgress:
    """What a watcher is told after each step."""

    step: int
    num_steps: int
    metrics: Mapping[str, float]
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """Where a run lies, how long it may take, and who is told of it."""

    output: Path
    """Folder of the run."""
    resume: bool = False
    """Go on from the newest sound checkpoint in `output`; a fresh start when there is none."""
    max_minutes: float | None = None
    """Stop after a checkpoint at this time."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, …; of several processes each takes its own GPU."""
    report: Progress | None = None
    """Told how far the preparation of the data is."""
    watch: Callable[[StepProgress], None] | None = None
    """Told of every step."""
    notice: Notice | None = None
    """Told in a line what was skipped, and what a resumed run asks for anew."""

    def silent(self) -> RunOptions:
        """The same with nobody to be told, for all processes of a run but the first."""
        return replace(self, report=None, watch=None, notice=None)
