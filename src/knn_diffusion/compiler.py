"""torch.compile, and one line where it does not work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from knn_diffusion.errors import MissingDependencyError

Backend = str | Callable[..., Any]
"""As `torch.compile` takes it."""

P = ParamSpec("P")
R = TypeVar("R")


def compile_module(module: nn.Module, backend: Backend = "inductor") -> None:
    """Let torch compile a module's forward when it is first called with a shape; its weights keep their names.

    Modules of one kind and shape share what is compiled.

    Raises: MissingDependencyError where torch cannot compile at all.
    """
    with _setting_up():
        module.compile(backend=backend, dynamic=False)


def compile_whole(function: Callable[P, R], backend: Backend = "inductor", mode: str | None = None) -> Callable[P, R]:
    """The function, which torch compiles as one graph when it is first called with a shape.

    Args: mode: as `torch.compile` takes it, with its own backend.
    Raises: MissingDependencyError where torch cannot compile at all.
    """
    with _setting_up():
        return torch.compile(function, fullgraph=True, dynamic=False, backend=backend, mode=mode)


@contextmanager
def _setting_up() -> Iterator[None]:
    try:
        import_module("torch._dynamo")  # takes a second
        yield
    except (RuntimeError, ImportError) as error:
        raise _unavailable(error) from error


@contextmanager
def compiler_told() -> Iterator[None]:
    """A block in which something may be compiled. Raises: MissingDependencyError where there is no working compiler."""
    with _setting_up():
        import torch._dynamo as dynamo
    try:
        yield
    except dynamo.exc.TorchDynamoException as error:
        if isinstance(cause := getattr(error, "inner_exception", None), torch.OutOfMemoryError):
            raise cause from None  # which is told elsewhere
        raise _unavailable(error) from error


def _unavailable(error: Exception) -> MissingDependencyError:
    cause = getattr(error, "inner_exception", error)
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return MissingDependencyError(
        f"expected torch.compile to work here, got {reason!r}: install a C++ compiler (g++; for a GPU also triton), "
        "or leave compile out"
    )
