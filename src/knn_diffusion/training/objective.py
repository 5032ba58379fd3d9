"""What the training loop needs from a part: losses in phases, validation, export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

from knn_diffusion.training.data import Batch


@dataclass(frozen=True, slots=True)
class Phase:
    """One loss over some parameters, with an optimizer of its own; a GAN has two."""

    name: str
    parameters: list[nn.Parameter]
    loss: Callable[[Batch, int, torch.Generator], dict[str, Tensor] | None]
    """(batch, step, generator) -> named scalars; "loss" is minimised, the others are logged. None skips this step.

    What has a number for each example is for `remember`. The batch may be a part of the step's, in a `Divisible` objective.
    """
    learning_rate_scale: float = 1.0
    remember: Callable[[Mapping[str, Tensor]], None] | None = None
    """Told after each step the numbers of all examples of the batch, in their order, the same in every process."""
    matrices: list[nn.Parameter] = field(default_factory=list)
    """Those of the parameters that are weight matrices between hidden layers, which Muon can move."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Validation:
    """Figures of the averaged network, and a picture to look at."""

    metrics: dict[str, float]
    preview: Image.Image | None = None


@runtime_checkable
class Objective(Protocol):
    """What one part minimises. Everything it must remember lies in `modules`."""

    network: nn.Module
    """What is exported; the moving average follows it."""
    modules: nn.Module
    """All modules with state, the network among them; this is what a checkpoint holds."""
    settings: Mapping[str, object]
    """What decides the result besides data and `TrainingConfig`, plain and nested; a resumed run must ask for the same."""

    def phases(self) -> list[Phase]:
        """The losses, in the order they are stepped."""

    def validate(self, network: nn.Module, step: int, generator: torch.Generator) -> Validation:
        """Judge `network` (the average, in eval mode) on data it does not train on."""

    def export(self, network: nn.Module, folder: Path, facts: Mapping[str, object]) -> None:
        """Write `network` as a model part with these facts beside it."""
