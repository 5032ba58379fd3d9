"""How many processes train one network: whole in each (DDP), or every layer spread over all (FSDP2).

Both train the same run: they average the same gradients, and differ in memory. With FSDP a process holds its share of the
weights, of their average and of AdamW's moments, and gathers a layer while it computes it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from knn_diffusion.errors import ConfigError, UsageError
from knn_diffusion.training.activations import Activations
from knn_diffusion.training.processes import Processes

ParallelKind = Literal["ddp", "fsdp"]


@runtime_checkable
class Divisible(Protocol):
    """An objective whose loss is a mean over examples that know nothing of each other, so that a batch may be cut.

    Numbers for each example that it wants to remember it gives to `Phase.remember` instead of keeping them in the loss.
    """

    network: nn.Module
    predict: nn.Module
    """The network as the loss calls it; DDP puts its wrapper here."""

    def shards(self, network: nn.Module) -> list[list[nn.Module]]:
        """Groups of layers of `network` whose weights only their own forward reads."""

    def compile_blocks(self) -> None:
        """Let torch compile what the network consists of."""

    def recompute_activations(self) -> None:
        """Let the network keep less for the backward pass, and compute it again there."""

    def activations(self, *, bfloat16: bool, recomputed: bool) -> Activations:
        """How much memory a pass takes in bfloat16 or float32, with or without recomputed activations."""


@dataclass(slots=True)
class Parallel:
    """A network spread over processes; alone it is what it was."""

    ddp: DistributedDataParallel | None = None
    plain: nn.Module | None = None
    """With FSDP, in the first process: an unsharded copy, to be validated and exported."""
    sharded: bool = False

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        """Around forward and backward of a micro-batch; gradients are averaged over the processes in the last one.

        With FSDP they are in each, or every process would have to keep whole gradients in between.
        """
        if self.ddp is not None and not last:
            return self.ddp.no_sync()
        return _without_warnings() if self.sharded else nullcontext()

    @contextmanager
    def whole(self, average: nn.Module, device: torch.device) -> Iterator[nn.Module | None]:
        """The network `average` on one device in the first process, None in the others; all must ask."""
        if not self.sharded:
            yield average
            return
        theirs = average.state_dict()
        own = None if self.plain is None else self.plain.state_dict()
        for name, value in theirs.items():
            full = whole_tensor(value)
            if own is not None:
                own[name].copy_(full)
        yield None if self.plain is None else self.plain.to(device)
        if self.plain is not None:
            self.plain.to("cpu")


def whole_tensor(value: Tensor) -> Tensor:
    """All of a tensor that may be spread over processes; then all must ask."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def check_divisible(objective: object, *, batch_size: int, cut: bool, processes: Processes) -> None:
    """Whether this objective and batch can be cut as asked.

    Args: cut: whether micro-batches, recomputed activations or compiled blocks were asked for.

    Raises: UsageError when the objective needs whole batches; ConfigError when the processes cannot share the batch.
    """
    if (processes.size > 1 or cut) and not isinstance(objective, Divisible):
        raise UsageError(
            f"expected one process, and no micro_batch_size, activation_checkpointing or compile, for "
            f"{type(objective).__name__}, whose loss looks at whole batches, got {processes.size} processes: leave them out"
        )
    if batch_size % processes.size:
        raise ConfigError(
            f"training.batch_size must be a multiple of the {processes.size} processes, got {batch_size}: change it, or "
            "--nproc-per-node"
        )


def spread(
    objective: object, average: Callable[[nn.Module], AveragedModel], kind: ParallelKind, processes: Processes
) -> tuple[Parallel, AveragedModel]:
    """Spread an objective's network, in place, and the moving average that `average` makes of it.

    Returns: how it is spread, and the average.
    """
    assert isinstance(objective, Divisible)
    network = objective.network
    for value in network.state_dict().values():
        dist.broadcast(value, 0)  # all begin with the weights of the first
    if kind == "ddp":
        objective.predict = DistributedDataParallel(network, gradient_as_bucket_view=True)
        return Parallel(ddp=objective.predict), average(network)
    plain = copy.deepcopy(network).cpu().eval() if processes.first else None
    averaged = average(network)
    mesh = init_device_mesh(processes.device.type, (processes.size,))
    for copied in (network, averaged.module):
        for layers in objective.shards(copied):
            fully_shard(layers, mesh=mesh)
        fully_shard(copied, mesh=mesh)
    return Parallel(plain=plain, sharded=True), averaged


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # Layers return views, as any linear layer does; the warning is of changing these in place, which nobody does.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
        yield
