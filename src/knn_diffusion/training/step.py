"""One step of a run: the batch cut into the processes' rows and these into micro-batches, gradients added up, weights moved."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from knn_diffusion.device import choose_dtype
from knn_diffusion.errors import TrainingError, UsageError
from knn_diffusion.randomness import BatchGenerator
from knn_diffusion.training.checkpoints import RunState
from knn_diffusion.training.data import Batch, Dataset
from knn_diffusion.training.memory import MemoryWatch
from knn_diffusion.training.objective import Objective, Phase
from knn_diffusion.training.parallel import Divisible, Parallel, check_divisible, spread, whole_tensor
from knn_diffusion.training.plan import TrainingConfig, batch_indices, learning_rate
from knn_diffusion.training.processes import Processes

Tensors = list[Tensor] | tuple[Tensor, ...]


@dataclass(slots=True)
class Run:
    """A run at a step: what is trained, and by whom."""

    objective: Objective
    phases: list[Phase]
    optimizers: dict[str, list[torch.optim.Optimizer]]
    """Of each phase, by its name."""
    average: AveragedModel
    parallel: Parallel
    config: TrainingConfig
    processes: Processes
    output: Path
    memory: MemoryWatch
    step: int = 0

    @property
    def state(self) -> RunState:
        """What a checkpoint holds of it."""
        named = {
            f"{phase}-{number}" if number else phase: one
            for phase, optimizers in self.optimizers.items()
            for number, one in enumerate(optimizers)
        }
        return RunState(modules=self.objective.modules, average=self.average, optimizers=named)


def begin(objective: Objective, config: TrainingConfig, output: Path, processes: Processes) -> Run:
    """A run before its first step, on its device and spread over its processes.

    Raises: UsageError or ConfigError when it cannot be cut or computed as the configuration asks; TrainingError when the
        device's memory does not suffice.
    """
    cut = config.activation_checkpointing or config.compile
    cut = cut or (config.micro_batch_size or config.batch_size) < config.batch_size
    check_divisible(objective, batch_size=config.batch_size, cut=cut, processes=processes)
    memory = MemoryWatch(objective, config, processes)
    memory.check()

    def averaged(network: nn.Module) -> AveragedModel:
        return AveragedModel(network, multi_avg_fn=_ema(config.ema_decay))

    with memory.running():
        objective.modules.to(processes.device)
        if config.activation_checkpointing and isinstance(objective, Divisible):
            objective.recompute_activations()
        if config.compile and isinstance(objective, Divisible):
            objective.compile_blocks()
        if processes.size == 1:
            parallel, average = Parallel(), averaged(objective.network)
        else:
            parallel, average = spread(objective, averaged, config.parallel, processes)
    phases = objective.phases()
    optimizers = {phase.name: optimizers_of(phase, config) for phase in phases}
    return Run(objective, phases, optimizers, average, parallel, config, processes, output, memory)


def take_step(run: Run, batch: Batch) -> dict[str, float]:
    """Make the run's next step, all phases of it.

    Args: batch: this process's rows of the step's batch, as `own_rows` gathers them.

    Returns: its figures, the same in every process.

    Raises: TrainingError before the weights move when a loss or its gradient is not finite.
    """
    step = run.step + 1
    batch = {name: value.to(run.processes.device, non_blocking=True) for name, value in batch.items()}
    run.objective.modules.train()
    rate = learning_rate(run.config, step)
    metrics = {"learning_rate": rate}
    for phase in run.phases:
        metrics |= _phase_step(run, phase, batch, step, rate)
    run.average.update_parameters(run.objective.network)
    run.step = step
    return metrics


def own_rows(run: Run, dataset: Dataset, step: int) -> Batch:
    """This process's rows of a step's batch, which is the same however many processes there are; on the CPU."""
    config, rows = run.config, run.processes.rows(run.config.batch_size)
    indices = batch_indices(len(dataset), config.batch_size, step, config.seed)[rows]
    generator = BatchGenerator.of(config.seed, "data", step, batch_size=config.batch_size, rows=rows)
    batch = dataset.batch(indices, generator)
    pinned = run.processes.device.type == "cuda"  # so that the copy to the GPU holds nobody up
    return {name: value.pin_memory() if pinned else value for name, value in batch.items()}


def _phase_step(run: Run, phase: Phase, batch: Batch, step: int, rate: float) -> dict[str, float]:
    optimizers = run.optimizers[phase.name]
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    found = _gradients(run, phase, batch, step)
    if found is None:
        return {}
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = rate * phase.learning_rate_scale
    norm = whole_tensor(nn.utils.clip_grad_norm_(phase.parameters, run.config.clip_norm))
    own = found["loss"].item()
    scalars = [name for name, value in found.items() if value.ndim == 0]
    means = run.processes.mean(torch.stack([found[name].float() for name in scalars]))
    values = {f"{phase.name}/{name}": mean for name, mean in zip(scalars, means.tolist(), strict=True)}
    loss, size = values[f"{phase.name}/loss"], float(norm)
    if not (math.isfinite(size) and math.isfinite(loss)):
        _stop_at(run.processes, f"the {phase.name} loss is {loss} with gradient norm {size} at step {step}", own)
    for optimizer in optimizers:
        optimizer.step()
    if phase.remember is not None:
        phase.remember({name: run.processes.gathered(value) for name, value in found.items() if value.ndim})
    return values | {f"{phase.name}/gradient_norm": size}


def _gradients(run: Run, phase: Phase, batch: Batch, step: int) -> dict[str, Tensor] | None:
    """Add up the gradients of this process's rows, one micro-batch after another.

    Returns: means of the scalars, and what there is for each example, over this process's rows; None when the phase rests.
    """
    config, device = run.config, run.processes.device
    rows = run.processes.rows(config.batch_size)
    dtype = choose_dtype(device, config.precision)
    parts: list[dict[str, Tensor]] = []
    cuts = [*range(rows.start, rows.stop, config.micro_batch_size or config.batch_size), rows.stop]
    for start, stop in pairwise(cuts):
        part, share = slice(start - rows.start, stop - rows.start), (stop - start) / (rows.stop - rows.start)
        generator = BatchGenerator.of(
            config.seed, phase.name, step, batch_size=config.batch_size, rows=slice(start, stop), device=device
        )
        with run.parallel.accumulating(stop == rows.stop):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                cut = batch if share == 1 else {name: value[part] for name, value in batch.items()}
                losses = phase.loss(cut, step, generator)
            if losses is None:
                return None
            (losses["loss"] * share).backward()
        parts.append({name: (value if value.ndim else value * share).detach() for name, value in losses.items()})
    return {
        name: torch.cat([one[name] for one in parts]) if value.ndim else torch.stack([one[name] for one in parts]).sum()
        for name, value in parts[0].items()
    }


def _stop_at(processes: Processes, what: str, own_loss: float) -> None:
    wrong = [
        str(number) for number, one in enumerate(processes.texts(str(own_loss)), 1) if not math.isfinite(float(one))
    ]
    where = f" (process {', '.join(wrong)} of {processes.size})" if processes.size > 1 and wrong else ""
    with processes.together():
        raise TrainingError(
            f"{what}{where}: the last checkpoint is sound; --resume it with a lower learning_rate or clip_norm"
        )


def warm_up(run: Run, dataset: Dataset) -> None:
    """Let DDP see one backward pass before the first step, and forget it.

    After its first one it lays its buckets out anew, and then sums in another order: with three processes or more a resumed
    run would differ in the last bits from the run that never stopped.
    """
    if run.parallel.ddp is not None and run.step < run.config.num_steps:
        rows = own_rows(run, dataset, run.step + 1)
        batch = {name: value.to(run.processes.device) for name, value in rows.items()}
        for phase in run.phases:
            _gradients(run, phase, batch, run.step + 1)
            for optimizer in run.optimizers[phase.name]:
                optimizer.zero_grad(set_to_none=True)


def optimizers_of(phase: Phase, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """AdamW, and behind it Muon for the matrices that it moves where the configuration asks for it.

    Muon's steps are scaled to the size of AdamW's (Moonlight, Liu et al. 2025), so that both share one learning rate and decay.

    Raises: UsageError when nothing of the phase can be moved by Muon.
    """
    muon = {id(p) for p in phase.matrices if p.ndim == 2} if config.optimizer == "muon" else set()
    if config.optimizer == "muon" and not muon:
        raise UsageError(
            f"expected a network with weight matrices between hidden layers for Muon, the {phase.name} names none: "
            "leave out training.optimizer"
        )
    rest = [p for p in phase.parameters if id(p) not in muon]
    matrices, vectors = [p for p in rest if p.ndim > 1], [p for p in rest if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    found: list[torch.optim.Optimizer] = [
        torch.optim.AdamW([g for g in groups if g["params"]], lr=config.learning_rate, betas=config.betas, fused=True)
    ]
    if muon:
        moved = [p for p in phase.matrices if id(p) in muon]
        decay, alike = config.weight_decay, "match_rms_adamw"
        found.append(torch.optim.Muon(moved, lr=config.learning_rate, weight_decay=decay, adjust_lr_fn=alike))
    return found


def _ema(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    """Moving average whose decay grows as (1 + n) / (10 + n) up to `decay`, so that early steps are forgotten."""

    @torch.no_grad()
    def update(averaged: Tensors, current: Tensors, count: Tensor | int) -> None:
        n = int(count)
        weight = 1 - min(decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(averaged, current, weight)

    return update
