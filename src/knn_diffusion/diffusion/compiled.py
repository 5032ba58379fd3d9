"""A pass of the sampler as one graph: compiled once for each kind of pass, on a GPU captured and replayed whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from knn_diffusion.compiler import Backend, compile_whole, compiler_told
from knn_diffusion.diffusion.step import Pass, Way, reverse_step
from knn_diffusion.errors import UsageError
from knn_diffusion.shapes import Tokens

MODES = {"cuda": "reduce-overhead"}
"""On a GPU the graph is captured: one launch in place of many hundred."""

MAX_GRAPHS = 64
"""Kinds of passes; by itself torch gives up after 8."""


class CompiledStep:
    """`reverse_step`, compiled by torch for this device when a pass of a new kind first comes.

    Passes are of one kind when they agree in shapes (images at once, slots of y), in the order, in truncation, in whether they
    are guided, and in the number of places, which is rounded up here. So a chain has one to three graphs, whatever its steps; a
    graph of a large denoiser takes a minute or so to make, and torch keeps the generated code on the disk for the next process.

    Tokens are those of `reverse_step` but for the last bits of the arithmetic, which a compiler is free to order anew.
    """

    def __init__(self, device: torch.device, *, backend: Backend = "inductor") -> None:
        """Nothing is compiled yet.

        Args: backend: as `torch.compile` takes it.
        Raises: MissingDependencyError where torch cannot compile at all.
        """
        self.captured = device.type == "cuda"
        self._graph = compile_whole(reverse_step, backend, MODES.get(device.type) if backend == "inductor" else None)

    def __call__(
        self, way: Way, now: Pass, x_n: Tokens, y: Any
    ) -> tuple[Tokens, Float[Tensor, "rows seq vocab"], Bool[Tensor, ""]]:
        """As `reverse_step`.

        Raises: MissingDependencyError where there is no working compiler; UsageError for more kinds of passes than are kept.
        """
        now = replace(now, places=rounded(now.places, x_n.shape[1]))
        if self.captured:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            with compiler_told(), torch._dynamo.config.patch(recompile_limit=MAX_GRAPHS):
                made = self._graph(way, now, x_n, y)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            raise UsageError(
                f"expected at most {MAX_GRAPHS} kinds of passes to compile, got one more: draw with fewer different k, "
                "or leave compile out"
            ) from None
        if not self.captured:
            return made
        x_s, logits, finite = made  # lie in the graph's own memory, which its next replay writes to
        return x_s.clone(), logits.clone(), finite.clone()


def rounded(places: int, seq: int) -> int:
    """A quarter, half or all of the tokens, so that passes that change more and more of them share their graphs."""
    return next(part for part in (-(-seq // 4), -(-seq // 2), seq) if part >= places)
