"""One training loop for every part: phases, schedule, EMA, clipping, logs, atomic checkpoints, exact resume.

A run is a pure function of (objective, dataset, configuration): the data order and every random draw are derived from
(seed, step), so a run that was stopped anywhere and resumed equals the run that never stopped, bit for bit on one machine.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from knn_diffusion.config import config, require, to_dict
from knn_diffusion.device import choose_device, choose_dtype
from knn_diffusion.errors import TrainingError, UsageError
from knn_diffusion.randomness import generator_for
from knn_diffusion.training.checkpoints import latest_checkpoint, load_checkpoint, planned_steps, save_checkpoint
from knn_diffusion.training.data import Batch, Dataset
from knn_diffusion.training.log import Log, open_log

Tensors = list[Tensor] | tuple[Tensor, ...]


@config
class TrainingConfig:
    """How long and how fast to train; everything counts steps, never epochs or processes."""

    num_steps: int
    """Optimizer steps of the whole run, ≥ 1."""
    batch_size: int
    """Examples of one step, ≥ 1."""
    learning_rate: float
    """Peak rate of AdamW, above 0."""
    final_learning_rate: float = 0.0
    """Rate at the last step; in between a cosine."""
    warmup_steps: int = 100
    """Steps of linear warm-up from zero, ≥ 0."""
    betas: tuple[float, float] = (0.9, 0.96)
    """AdamW's moment decays; VQ-Diffusion's are (0.9, 0.96)."""
    weight_decay: float = 0.045
    """AdamW's decoupled decay, on matrices only."""
    clip_norm: float = 1.0
    """Gradients of a phase are scaled down to this norm."""
    ema_decay: float = 0.999
    """Decay of the weights' moving average a step, in [0, 1); reached gradually from 0."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    validate_every: int = 500
    """Steps between validations with a preview."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last two are kept."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of matrix products; auto is bfloat16 where the hardware computes in it."""
    seed: int = 0
    """Everything random in the run follows from it."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "log_every", "validate_every", "checkpoint_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("warmup_steps", "final_learning_rate", "weight_decay"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require(self.learning_rate > 0, "learning_rate", self.learning_rate, "above 0")
        require(all(0 <= beta < 1 for beta in self.betas), "betas", self.betas, "two numbers in [0, 1)")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "in [0, 1)")
        require(self.clip_norm > 0, "clip_norm", self.clip_norm, "above 0")


@dataclass(frozen=True, slots=True)
class Phase:
    """One loss over some parameters, with an optimizer of its own; a GAN has two."""

    name: str
    parameters: list[nn.Parameter]
    loss: Callable[[Batch, int, torch.Generator], dict[str, Tensor] | None]
    """(batch, step, generator) -> named scalars; "loss" is minimised, the others are logged. None skips this step."""
    learning_rate_scale: float = 1.0


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """What a watcher is told after each step."""

    step: int
    num_steps: int
    metrics: Mapping[str, float]
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """Where a run stands when `train` returns."""

    step: int
    finished: bool
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class _Run:
    objective: Objective
    phases: list[Phase]
    optimizers: dict[str, torch.optim.Optimizer]
    average: AveragedModel
    config: TrainingConfig
    device: torch.device
    output: Path
    step: int = 0


def train(
    objective: Objective,
    dataset: Dataset,
    config: TrainingConfig,
    output: Path,
    *,
    resume: bool = False,
    max_minutes: float | None = None,
    device: str = "auto",
    watch: Callable[[Progress], None] | None = None,
    notice: Callable[[str], None] | None = None,
) -> TrainingResult:
    """Train until `num_steps`, `max_minutes` or Ctrl-C; in every case a checkpoint of the last whole step is left.

    Writes under `output`: `model/` (the averaged network), `checkpoints/`, `metrics.jsonl`, `previews/`, `tensorboard/`.

    Args:
        resume: go on from the newest sound checkpoint; a fresh start when there is none.
        watch: called after every step.
        notice: told a line for each setting that a resumed run asks for anew.

    Raises: UsageError when `output` holds another run and `resume` is off; TrainingError when a loss is not finite.
    """
    if len(dataset) < 1:
        raise TrainingError("expected images to train on, got none: check --images")
    check_output(output, resume)
    run = _prepare(objective, config, output, device)
    _resume(run, notice)
    started = time.monotonic()
    metrics: dict[str, float] = {}
    with _stop_on_interrupt() as interrupted, open_log(run.output, run.step) as log:
        while run.step < config.num_steps:
            metrics = _step(run, dataset)
            due = run.step == config.num_steps
            if run.step % config.log_every == 0 or due:
                log({"step": run.step, "minutes": round((time.monotonic() - started) / 60, 3), **metrics}, None)
            if run.step % config.validate_every == 0 or due:
                metrics |= _validate(run, log)
            if watch is not None:
                seconds = time.monotonic() - started
                watch(Progress(step=run.step, num_steps=config.num_steps, metrics=metrics, seconds=seconds))
            late = max_minutes is not None and time.monotonic() - started > 60 * max_minutes
            if run.step % config.checkpoint_every == 0 or due or late or interrupted():
                _save(run)
            if interrupted():
                raise KeyboardInterrupt
            if late:
                break
    return TrainingResult(step=run.step, finished=run.step >= config.num_steps, metrics=metrics)


def check_output(output: Path, resume: bool) -> None:
    """Refuse a folder that a new run would spoil; to be asked before data is prepared for the run.

    Raises: UsageError when `output` is no folder, or holds another run and `resume` is off.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"expected a folder for --output, {output} is a file: choose another name")
    newest = latest_checkpoint(output / "checkpoints")
    if newest is not None and not resume:
        step, of = planned_steps(newest) or (0, 1)
        if step >= of:
            raise UsageError(
                f"{output} already holds a complete run (step {step} of {of}), its model lies in {output / 'model'}: "
                "choose another --output, or add --resume and a larger training.num_steps"
            )
        raise UsageError(
            f"{output} already holds a run (at {newest.name}): add --resume to go on, or choose another --output"
        )


def batch_indices(num_items: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Which examples step 1, 2, … sees: consecutive pieces of one shuffled pass after another.

    Returns: [batch_size] int64; a batch may reach over the end of a pass into the next.
    """
    positions = torch.arange((step - 1) * batch_size, step * batch_size)
    rounds = positions // num_items
    orders = {
        int(r): torch.randperm(num_items, generator=generator_for(seed, "order", int(r))) for r in rounds.unique()
    }
    return torch.stack([orders[int(r)][p] for r, p in zip(rounds, positions % num_items, strict=True)])


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Linear warm-up to the peak, then a cosine down to the final rate at `num_steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * fall


def _prepare(objective: Objective, config: TrainingConfig, output: Path, device: str) -> _Run:
    place = choose_device(device)
    objective.modules.to(place)
    phases = objective.phases()
    optimizers: dict[str, torch.optim.Optimizer] = {phase.name: _optimizer(phase, config) for phase in phases}
    average = AveragedModel(objective.network, multi_avg_fn=_ema(config.ema_decay))
    return _Run(objective, phases, optimizers, average, config, place, output)


def _optimizer(phase: Phase, config: TrainingConfig) -> torch.optim.Optimizer:
    matrices = [p for p in phase.parameters if p.ndim > 1]
    vectors = [p for p in phase.parameters if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.learning_rate, betas=config.betas, fused=True
    )


def _ema(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """Moving average whose decay grows as (1 + n) / (10 + n) up to `decay`, so that early steps are forgotten."""

    @torch.no_grad()
    def update(averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
        n = int(count)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(averaged, current, weight)

    return update


def _step(run: _Run, dataset: Dataset) -> dict[str, float]:
    step, config = run.step + 1, run.config
    indices = batch_indices(len(dataset), config.batch_size, step, config.seed)
    batch = dataset.batch(indices, generator_for(config.seed, "data", step))
    batch = {name: value.to(run.device, non_blocking=True) for name, value in batch.items()}
    run.objective.modules.train()
    rate = learning_rate(config, step)
    metrics = {"learning_rate": rate}
    for phase in run.phases:
        metrics |= _phase_step(run, phase, batch, step, rate)
    run.average.update_parameters(run.objective.network)
    run.step = step
    return metrics


def _phase_step(run: _Run, phase: Phase, batch: Batch, step: int, rate: float) -> dict[str, float]:
    generator = generator_for(run.config.seed, phase.name, step, device=run.device)
    dtype = choose_dtype(run.device, run.config.precision)
    with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = phase.loss(batch, step, generator)
    if losses is None:
        return {}
    optimizer = run.optimizers[phase.name]
    optimizer.zero_grad(set_to_none=True)
    for group in optimizer.param_groups:
        group["lr"] = rate * phase.learning_rate_scale
    losses["loss"].backward()
    norm = nn.utils.clip_grad_norm_(phase.parameters, run.config.clip_norm)
    if not bool(torch.isfinite(norm) & torch.isfinite(losses["loss"].detach())):
        raise TrainingError(
            f"the {phase.name} loss is {losses['loss'].item()} with gradient norm {norm.item()} at step {step}: "
            "the last checkpoint is sound; --resume it with a lower learning_rate or clip_norm"
        )
    optimizer.step()
    values = {f"{phase.name}/{name}": float(value.detach()) for name, value in losses.items()}
    return values | {f"{phase.name}/gradient_norm": float(norm)}


@torch.no_grad()
def _validate(run: _Run, log: Log) -> dict[str, float]:
    network = run.average.module
    network.eval()
    result = run.objective.validate(network, run.step, generator_for(run.config.seed, "validation", device=run.device))
    metrics = {f"validation/{name}": value for name, value in result.metrics.items()}
    log({"step": run.step, **metrics}, result.preview)
    return metrics


def _save(run: _Run) -> None:
    folder = run.output / "checkpoints"
    save_checkpoint(
        folder,
        step=run.step,
        modules=run.objective.modules,
        average=run.average,
        optimizers=run.optimizers,
        settings=_settings(run),
    )
    run.objective.export(
        run.average.module, run.output / "model", {"steps": run.step, "of_steps": run.config.num_steps}
    )


def _resume(run: _Run, notice: Callable[[str], None] | None) -> None:
    folder = run.output / "checkpoints"
    if latest_checkpoint(folder) is not None:
        run.step = load_checkpoint(
            folder,
            modules=run.objective.modules,
            average=run.average,
            optimizers=run.optimizers,
            settings=_settings(run),
            notice=notice,
        )


def _settings(run: _Run) -> dict[str, object]:
    return {**run.objective.settings, "training": to_dict(run.config)}


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C lets the step in hand finish, so that what is saved is whole; a second Ctrl-C stops at once."""
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        previous = signal.signal(signal.SIGINT, note)
    except ValueError:  # not the main thread: nobody can press Ctrl-C here
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, previous)
