"""One training loop for every part: phases, schedule, EMA, clipping, logs, atomic checkpoints, exact resume.

A run is a pure function of (objective, dataset, configuration): the data order and every random draw are derived from
(seed, step), so a run that was stopped anywhere and resumed equals the run that never stopped, bit for bit on one machine.
How many processes share a batch, and in which micro-batches, changes the rounding of sums alone.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from knn_diffusion.compiler import compiler_told
from knn_diffusion.config import to_dict
from knn_diffusion.device import choose_device
from knn_diffusion.errors import TrainingError, UsageError
from knn_diffusion.randomness import generator_for
from knn_diffusion.training.ahead import Ahead
from knn_diffusion.training.checkpoints import latest_checkpoint, load_checkpoint, planned_steps, save_checkpoint
from knn_diffusion.training.data import Dataset
from knn_diffusion.training.log import Log, open_log
from knn_diffusion.training.objective import Objective, Validation
from knn_diffusion.training.options import RunOptions, StepProgress
from knn_diffusion.training.plan import TrainingConfig
from knn_diffusion.training.processes import Processes
from knn_diffusion.training.step import Run, begin, own_rows, take_step, warm_up


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingResult:
    """Where a run stands when `train` returns."""

    step: int
    finished: bool
    metrics: dict[str, float] = field(default_factory=dict)


def train(
    objective: Objective,
    dataset: Dataset,
    config: TrainingConfig,
    options: RunOptions,
    processes: Processes | None = None,
) -> TrainingResult:
    """Train until `num_steps`, the time is up or Ctrl-C; in every case a checkpoint of the last whole step is left.

    Writes under the output: `model/` (the averaged network), `checkpoints/`, `metrics.jsonl`, `previews/`, `tensorboard/`.

    Args: processes: those that share the work, all with the same arguments; None for this one alone.

    Raises: UsageError when the output holds another run and is not to be resumed, or the objective cannot be cut as the
        configuration asks; MissingDependencyError when it asks to compile and there is no working compiler; TrainingError
        when a loss is not finite or the device's memory does not suffice; PeerError when that was said by another process.
    """
    processes = processes or Processes(device=choose_device(options.device))
    with processes.together():
        if len(dataset) < 1:
            raise TrainingError("expected images to train on, got none: check --images")
        check_output(options.output, options.resume)
        run = begin(objective, config, options.output, processes)
        with run.memory.running():
            _resume(run, options)
    with run.memory.running(), compiler_told() if config.compile else nullcontext():
        warm_up(run, dataset)
        return _steps(run, dataset, options)


def _steps(run: Run, dataset: Dataset, options: RunOptions) -> TrainingResult:
    """What is left of a run."""
    config = run.config
    started = time.monotonic()
    metrics: dict[str, float] = {}
    ahead = Ahead(partial(own_rows, run, dataset), config.num_steps)
    with _stop_on_interrupt() as interrupted, _open_log(run) as log, ahead:
        while run.step < config.num_steps:
            metrics = take_step(run, ahead.take(run.step + 1))
            due, minutes = run.step == config.num_steps, (time.monotonic() - started) / 60
            if run.step % config.log_every == 0 or due:
                waited = round(ahead.waited / 60, 3)
                log({"step": run.step, "minutes": round(minutes, 3), "minutes_waited": waited, **metrics}, None)
            if run.step % config.validate_every == 0 or due:
                metrics |= _validate(run, log)
            seconds = time.monotonic() - started
            if options.watch is not None:
                options.watch(StepProgress(step=run.step, num_steps=config.num_steps, metrics=metrics, seconds=seconds))
            late = options.max_minutes is not None and seconds > 60 * options.max_minutes
            stopped, late = run.processes.any(interrupted(), late)
            if run.step % config.checkpoint_every == 0 or due or late or stopped:
                _save(run)
            if stopped:
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


@torch.no_grad()
def _validate(run: Run, log: Log) -> dict[str, float]:
    result = Validation(metrics={})
    with run.parallel.whole(run.average.module, run.processes.device) as network, run.processes.together():
        if run.processes.first and network is not None:
            network.eval()
            generator = generator_for(run.config.seed, "validation", device=run.processes.device)
            result = run.objective.validate(network, run.step, generator)
    metrics = {f"validation/{name}": value for name, value in result.metrics.items()}
    log({"step": run.step, **metrics}, result.preview)
    return metrics


def _save(run: Run) -> None:
    save_checkpoint(
        run.output / "checkpoints", step=run.step, state=run.state, settings=_settings(run), processes=run.processes
    )
    with run.parallel.whole(run.average.module, run.processes.device) as network, run.processes.together():
        if run.processes.first and network is not None:
            facts = {"steps": run.step, "of_steps": run.config.num_steps}
            run.objective.export(network, run.output / "model", facts)


def _resume(run: Run, options: RunOptions) -> None:
    folder = run.output / "checkpoints"
    if latest_checkpoint(folder) is not None:
        settings = _settings(run)
        run.step = load_checkpoint(
            folder, state=run.state, settings=settings, processes=run.processes, notice=options.notice
        )


def _settings(run: Run) -> dict[str, object]:
    return {**run.objective.settings, "training": to_dict(run.config)}


@contextmanager
def _open_log(run: Run) -> Iterator[Log]:
    """A log that the first process writes; all must call it."""
    with ExitStack() as stack:
        with run.processes.together():
            write = stack.enter_context(open_log(run.output, run.step)) if run.processes.first else None

        def log(metrics: Mapping[str, float | int], preview: Image.Image | None) -> None:
            with run.processes.together():
                if write is not None:
                    write(metrics, preview)

        yield log


@contextmanager
def _stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C lets the step in hand finish, so that what is saved is whole; a second Ctrl-C stops at once.

    So does the signal to terminate, which torchrun sends after Ctrl-C and a cluster before it takes a machine back.
    """
    asked: list[int] = []

    def note(number: int, frame: object) -> None:
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: nobody can press Ctrl-C here
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
