"""The processes of one run under torchrun: which one this is, how they wait for each other and tell of errors.

What goes wrong in one of them is raised in all: where it happened as itself, elsewhere as a PeerError, which the command line
does not repeat. Words and flags travel through a gloo group of their own, which has no time limit, so that all can wait while
the first prepares data or draws previews; nothing that is sent is pickled.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
from torch.distributed.rendezvous import rendezvous

from knn_diffusion.device import choose_device
from knn_diffusion.errors import KnnDiffusionError, PeerError, TrainingError, UsageError

PATIENCE = timedelta(days=30)
"""How long a process waits for words of the others; one that has died is noticed at once by its closed connection."""

_STOPPED = "process "
"""How the text of a PeerError begins."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """This process among those of its run; alone by default."""

    device: torch.device
    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None

    @property
    def first(self) -> bool:
        """Whether this one writes, logs and speaks."""
        return self.rank == 0

    def rows(self, batch_size: int) -> slice:
        """This process's part of a batch; parts do not overlap, and are equal where `size` divides the batch."""
        return slice(self.rank * batch_size // self.size, (self.rank + 1) * batch_size // self.size)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over the processes of these numbers."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def gathered(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in their order; every process has equally many."""
        if self.size == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def any(self, *flags: bool) -> list[bool]:
        """For each flag whether a process raised it."""
        if self.size == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.uint8)
        dist.all_reduce(raised, dist.ReduceOp.MAX, group=self.control)
        return [bool(one) for one in raised]

    def texts(self, own: str) -> list[str]:
        """What each process says."""
        if self.size == 1:
            return [own]
        said = torch.frombuffer(bytearray(own.encode() + b"\0"), dtype=torch.uint8)
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(said)]), group=self.control)
        longest = max(int(length) for length in lengths)
        padded = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(padded, torch.nn.functional.pad(said, (0, longest - len(said))), group=self.control)
        return [bytes(text.tolist()).rstrip(b"\0").decode() for text in padded]

    def claim(self, what: str) -> bool:
        """Whether this process is the first of the run that claims this; asked without waiting for the others."""
        return self.size == 1 or bool(_get_default_store().add(what, 1) == 1)

    def require_same(self, own: str, problem: str) -> None:
        """Hold all to the same text. Raises: UsageError with this problem when one has another."""
        texts = self.texts(own)
        with self.together():
            if len(set(texts)) > 1:
                raise UsageError(problem)

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block after which all go on, or none: an error in one is raised in all, and said by the first that has it."""
        if self.size == 1:
            yield
            return
        problem: Exception | None = None
        try:
            yield
        except (KnnDiffusionError, OSError) as error:
            problem = error
        own = "" if problem is None else str(problem) or type(problem).__name__
        said = self.texts(own)
        if problem is not None and said.index(own) == self.rank:
            raise problem
        for rank, text in enumerate(said):
            if text and not text.startswith(_STOPPED):
                raise PeerError(f"{_STOPPED}{rank + 1} of {self.size} stopped: {text}") from None

    @contextmanager
    def first_goes_first(self) -> Iterator[None]:
        """A block that the first process does alone; the others do it then, and find in a cache what it has left."""
        if self.first:
            with self.together():
                yield
        else:
            with self.together():
                pass
            yield


@contextmanager
def joined(device: str = "auto") -> Iterator[Processes]:
    """The processes that torchrun started together with this one; without torchrun this one is alone.

    Args: device: auto, cpu or cuda; each process takes the GPU of its number on its machine.

    Raises: UsageError when there are fewer GPUs than processes; TrainingError when another process has died.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Processes(device=choose_device(device))
        return
    own = _own_device(choose_device(device))
    begun = dist.is_initialized()
    try:
        if not begun:
            _connect(own)
        control = dist.new_group(backend="gloo", timeout=PATIENCE)
        yield Processes(device=own, rank=dist.get_rank(), size=size, control=control)
    except RuntimeError as error:
        if not _tells_of_death(error):
            raise
        raise TrainingError(
            "another process of this run has died (its own error, or a signal, stands beside this one): run the same command "
            "again with --resume, or let torchrun do it (--max-restarts 3)"
        ) from None
    if not begun:  # after an error others may never answer: then the end of the process closes everything
        dist.destroy_process_group()


def _connect(device: torch.device) -> None:
    store, rank, size = next(rendezvous("env://"))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        # torchrun keeps one store for all its attempts, where the addresses of those that died still lie. (On several machines
        # each counts its own attempts.)
        store = PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size, device_id=device if on_gpu else None
    )


def refuse_many(part: str, reason: str) -> None:
    """Stop a training that knows one process only.

    Raises: UsageError in the first process, PeerError in the others.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if size > 1:
        message = f"expected one process to train the {part}, whose {reason}, got {size}: run it without torchrun"
        raise PeerError(message) if rank else UsageError(message)


def is_first() -> bool:
    """Whether this process is the one that speaks, by what torchrun says."""
    return os.environ.get("RANK", "0") == "0"


def _own_device(device: torch.device) -> torch.device:
    if device.type == "cpu":
        return device
    if device.type != "cuda" or device.index is not None:
        raise UsageError(
            f"expected --device auto, cpu or cuda with several processes, each takes a GPU of its own, got {device}: "
            "choose one of these, and CUDA_VISIBLE_DEVICES to leave GPUs out"
        )
    place, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if place >= count:
        raise UsageError(
            f"expected a GPU for each process of this machine, got {count} for at least {place + 1}: "
            f"torchrun --nproc-per-node {count}"
        )
    torch.cuda.set_device(place)
    return torch.device("cuda", place)


def _tells_of_death(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)
