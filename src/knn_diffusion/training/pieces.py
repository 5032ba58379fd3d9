"""Tensors of a run on disk in pieces: each process writes the rows it holds, and any number of processes read them.

Tensors that FSDP spreads lie in several files, in the order of the processes, each with the rows of one along the first axis;
what all processes hold alike lies in the first file. Names and shapes stand in the header of each safetensors file, so there
is nothing else to be kept in step.

torch.distributed.checkpoint does the same and more, but reads its layout from a pickle, has no digests, and does not say
whether a folder is whole; only rows of one axis ever have to be put together here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from knn_diffusion.errors import CheckpointError


def file_name(tensors: Mapping[str, Tensor], rank: int, size: int) -> str:
    """The file of this process: one of many when something is spread, else the only one."""
    spread = any(isinstance(value, DTensor) for value in tensors.values())
    return f"state-{rank + 1:05d}-of-{size:05d}.safetensors" if spread else "state.safetensors"


def own_pieces(tensors: Mapping[str, Tensor], first: bool) -> dict[str, Tensor]:
    """What this process writes: its rows of what is spread, and in the first process what is not."""
    pieces = {}
    for name, value in tensors.items():
        if not isinstance(value, DTensor):
            if first:
                pieces[name] = value
        elif (rows := value.to_local()).numel():
            pieces[name] = rows
    return pieces


@dataclass(frozen=True, slots=True)
class Pieces:
    """The open files of a checkpoint, in the order of the processes that wrote them."""

    files: Sequence[Any]

    def under(self, prefix: str, like: Callable[[str], Tensor | None]) -> dict[str, Tensor]:
        """The tensors whose names begin so, without that: whole, or this process's rows where `like` is spread.

        Raises: CheckpointError when a tensor does not have the shape of the one it is spread like.
        """
        names = dict.fromkeys(name for file in self.files for name in file.keys() if name.startswith(prefix))  # noqa: SIM118
        return {(short := name.removeprefix(prefix)): self._read(name, like(short)) for name in names}

    def _read(self, name: str, like: Tensor | None) -> Tensor:
        parts = [file for file in self.files if name in file.keys()]  # noqa: SIM118
        shapes = [parts[0].get_slice(name).get_shape(), *(part.get_slice(name).get_shape() for part in parts[1:])]
        if not shapes[0]:
            return parts[0].get_tensor(name)
        rows = sum(shape[0] for shape in shapes)
        if not isinstance(like, DTensor):
            return torch.cat([part.get_tensor(name) for part in parts])
        if (rows, *shapes[0][1:]) != tuple(like.shape):
            raise CheckpointError(
                f"expected {name} of shape {tuple(like.shape)}, got {(rows, *shapes[0][1:])}: the checkpoint is of another model"
            )
        start = min(rows, like.device_mesh.get_local_rank() * -(-rows // like.device_mesh.size()))  # as FSDP cuts rows
        own = self._rows(name, parts, start, start + len(like.to_local()))
        own = own.to(like.device)
        return DTensor.from_local(own, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())

    def _rows(self, name: str, parts: Sequence[Any], start: int, stop: int) -> Tensor:
        found, before = [], 0
        for part in parts:
            piece = part.get_slice(name)
            count = piece.get_shape()[0]
            found.append(piece[min(count, max(0, start - before)) : min(count, max(0, stop - before))])
            before += count
        return torch.cat(found)


@contextmanager
def open_pieces(files: Sequence[Path]) -> Iterator[Pieces]:
    """Open the files of a checkpoint.

    Raises: CheckpointError when one is no readable safetensors file.
    """
    with ExitStack() as stack:
        try:
            opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{files[0].parent} is not readable ({error}): resume an older checkpoint") from None
        yield Pieces(opened)
