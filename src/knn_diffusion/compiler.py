"""torch.compile, and one line where it does not work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from knn_diffusion.errors import MissingDependencyError


def compile_module(module: nn.Module, backend: str = "inductor") -> None:
    """Let torch compile a module's forward when it is first called with a shape; its weights keep their names.

    Modules of one kind and shape share what is compiled.

    Raises: MissingDependencyError where torch cannot compile at all.
    """
    with compiler_told():
        module.compile(backend=backend, dynamic=False)


@contextmanager
def compiler_told() -> Iterator[None]:
    """A block in which something may be compiled. Raises: MissingDependencyError where there is no working compiler."""
    try:
        import torch._dynamo as dynamo  # takes a second
    except (RuntimeError, ImportError) as error:
        raise _unavailable(error) from error
    try:
        yield
    except dynamo.exc.TorchDynamoException as error:
        raise _unavailable(error) from error


def _unavailable(error: Exception) -> MissingDependencyError:
    cause = getattr(error, "inner_exception", error)
    reason = (str(cause).strip() or type(cause).__name__).splitlines()[0]
    return MissingDependencyError(
        f"expected torch.compile to work here, got {reason!r}: install a C++ compiler (g++; for a GPU also triton), "
        "or leave compile out"
    )
