"""Does a run fit into its GPU, and if not, with which settings would it: said before the first step, or when memory runs out.

    state         weights and buffers, gradients and AdamW's two moments of what is trained, and the moving average; exact
    activations   what a pass takes for its examples; known of an objective that can be cut into micro-batches

With FSDP on N processes each holds an Nth of the state, and gathers what it computes with: one block's layers after another, and
all that is in no block's group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from knn_diffusion.device import (
    binary_size,
    choose_dtype,
    computes_bfloat16,
    device_name,
    free_bytes,
    full_memory_told,
)
from knn_diffusion.errors import KnnDiffusionError, PeerError, TrainingError
from knn_diffusion.training.activations import Activations
from knn_diffusion.training.objective import Objective
from knn_diffusion.training.parallel import Divisible
from knn_diffusion.training.plan import TrainingConfig
from knn_diffusion.training.processes import Processes

ROOM = 0.95
"""Share of the free memory that what is advised may fill; the rest is lost between tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What decides how much memory a process needs."""

    bfloat16: bool
    recomputed: bool
    fsdp: bool
    processes: int
    micro_batch: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Bytes that a process needs.

    start        before the first step: with FSDP the network and its average are whole until they are cut
    state        from the first step on
    activations  what a pass takes beside the state; None where nobody can tell
    """

    start: int
    state: int
    activations: Activations | None

    def of(self, examples: int) -> int:
        """The most, with so many examples at once."""
        return max(self.start, self.state + (self.activations.of(examples) if self.activations is not None else 0))

    def fitting(self, room: int) -> int:
        """How many examples can be computed at once in so many bytes; 0 when none can."""
        if self.activations is None or self.start > room:
            return 0
        return max(0, self.activations.fitting(room - self.state))


def need(objective: Objective, setting: Setting) -> Need:
    """What a process of a run needs under a setting; the objective's modules are whole, on any device."""
    parameters = list(objective.modules.parameters())
    held = _bytes(parameters) + _bytes(objective.modules.buffers())
    average = _bytes(objective.network.state_dict().values())
    state = held + average + 3 * _bytes(one for one in parameters if one.requires_grad)
    activations, start = None, 0
    if isinstance(objective, Divisible):
        activations = objective.activations(bfloat16=setting.bfloat16, recomputed=setting.recomputed)
        if setting.fsdp and setting.processes > 1:
            groups = objective.shards(objective.network)
            sizes = [sum(_bytes(layer.parameters()) for layer in group) for group in groups]
            rest = _bytes(objective.network.parameters()) - sum(sizes)  # gathered for the whole pass
            gathered = 2 * (rest + max(sizes, default=0))  # and their gradients
            start, state = held + average, state // setting.processes + gathered
    return Need(start=start, state=state, activations=activations)


class MemoryWatch:
    """Holds a run against the memory of its device, and says in a line what would fit."""

    def __init__(self, objective: Objective, config: TrainingConfig, processes: Processes) -> None:
        self.objective, self.config, self.processes = objective, config, processes
        self.room = free_bytes(processes.device)
        """Bytes for the run; None where nobody counts them."""
        share = config.batch_size // processes.size
        self.setting = Setting(
            bfloat16=choose_dtype(processes.device, config.precision) == torch.bfloat16,
            recomputed=config.activation_checkpointing,
            fsdp=config.parallel == "fsdp",
            processes=processes.size,
            micro_batch=max(1, min(config.micro_batch_size or share, share)),
        )
        self.need = need(objective, self.setting)

    def check(self) -> None:
        """Raise TrainingError when the device cannot hold the run as it is set."""
        most = self.setting.micro_batch
        if self.room is not None and self.need.of(most) > self.room:
            raise TrainingError(
                f"expected {self._wanted()}, got {binary_size(self.room)} free on {device_name(self.processes.device)}: "
                f"{self._cure(most)}"
            )

    @contextmanager
    def running(self) -> Iterator[None]:
        """A block of the run. Raises: TrainingError when memory runs out in it; PeerError when another process said so."""
        with full_memory_told(self._ran_out):
            yield

    def _ran_out(self) -> KnnDiffusionError:
        if not self.processes.claim("memory"):
            return PeerError("process stopped: its memory ran out, as that of another one")
        had = "" if self.room is None else f", which had {binary_size(self.room)} free"
        return TrainingError(
            f"memory ran out on {device_name(self.processes.device)}{had}, expected {self._wanted()}: "
            f"{self._cure(self.setting.micro_batch // 2)}; --resume goes on from the last checkpoint, which is sound"
        )

    def _wanted(self) -> str:
        wanted, at_once = self.need, self.setting.micro_batch
        what = f"{binary_size(wanted.state)} for weights, gradients, average and AdamW's moments"
        if wanted.activations is None:
            return what
        examples = "1 example" if at_once == 1 else f"{at_once} examples at once"
        return f"{what} and {binary_size(wanted.activations.of(at_once))} for {examples}"

    def _cure(self, most: int) -> str:
        """What would fit; of the setting itself at most so many examples at once."""
        if self.need.activations is None:
            fewer = max(1, self.config.batch_size // 2)
            return f"start again with --set training.batch_size={fewer} or a smaller network, or use a larger GPU"
        if self.room is None:
            least = f"--set training.micro_batch_size={max(1, most)} --set training.activation_checkpointing=true"
            return f"add {least}" if most or not self.setting.recomputed else "train a smaller network"
        found = [cure for other in self._others() if (cure := self._fitting(other, most))] or list(self._spread())
        if found:
            return "add " + ", or ".join(found)
        smallest = replace(self.setting, recomputed=True, bfloat16=self.setting.bfloat16 or self._may_halve())
        return (
            f"use a GPU with {binary_size(int(need(self.objective, smallest).of(1) / ROOM))} free, or a smaller network"
        )

    def _others(self) -> Iterator[Setting]:
        """The setting itself, and each with one thing less to hold, in the order of what they cost."""
        yield self.setting
        if self._may_halve():
            yield replace(self.setting, bfloat16=True)
        if self.setting.processes > 1 and not self.setting.fsdp:
            yield replace(self.setting, fsdp=True)
        if not self.setting.recomputed:
            yield replace(self.setting, recomputed=True)

    def _may_halve(self) -> bool:
        return not self.setting.bfloat16 and computes_bfloat16(self.processes.device)

    def _spread(self) -> Iterator[str]:
        """FSDP on as few processes as it takes."""
        for count in range(self.setting.processes + 1, self.config.batch_size + 1):
            if self.config.batch_size % count == 0:
                share = min(self.setting.micro_batch, self.config.batch_size // count)
                spread = replace(self.setting, fsdp=True, recomputed=True, processes=count, micro_batch=share)
                if cure := self._fitting(spread, share):
                    yield f"{cure}, on {count} such GPUs (torchrun --nproc-per-node {count})"
                    return

    def _fitting(self, other: Setting, most: int) -> str:
        """The options that make another setting fit, empty when none do."""
        assert self.room is not None
        now, options = self.setting, []
        fits = min(other.micro_batch, need(self.objective, other).fitting(int(ROOM * self.room)))
        if other == now:
            fits = min(fits, most)
        if fits < 1:
            return ""
        if other.bfloat16 != now.bfloat16:
            options.append("--set training.precision=bfloat16")
        if other.fsdp != now.fsdp:
            options.append("--set training.parallel=fsdp")
        if other.recomputed != now.recomputed:
            options.append("--set training.activation_checkpointing=true")
        if fits < other.micro_batch or not options:
            options.append(f"--set training.micro_batch_size={fits}")
        return " ".join(options)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
