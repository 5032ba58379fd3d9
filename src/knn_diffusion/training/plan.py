"""What a run does at each of its steps: its length, the learning rate, and which examples it sees."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from knn_diffusion.config import config, require
from knn_diffusion.randomness import generator_for
from knn_diffusion.training.parallel import ParallelKind


@config
class TrainingConfig:
    """How long and how fast to train; everything counts steps, never epochs or processes."""

    num_steps: int
    """Optimizer steps of the whole run, ≥ 1."""
    batch_size: int
    """Examples of one step, ≥ 1."""
    learning_rate: float
    """Peak rate of the optimizer, above 0."""
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
    optimizer: Literal["adamw", "muon"] = "adamw"
    """What moves the weights: AdamW, or Muon for the matrices of the network's blocks and AdamW for the rest."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of matrix products; auto is bfloat16 where the hardware computes in it."""
    micro_batch_size: int | None = None
    """Examples that a process computes at once, ≥ 1; None for its whole share of a batch. A matter of memory alone."""
    activation_checkpointing: bool = False
    """Whether the backward pass computes again what the forward pass then need not keep; a matter of memory alone."""
    compile: bool = False
    """Whether torch compiles the network's blocks: the first step takes longer, the others are faster. A matter of time alone."""
    parallel: ParallelKind = "ddp"
    """How several processes hold the network: each all of it (ddp), or each a share (fsdp). A matter of memory alone."""
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
        micro = self.micro_batch_size
        require(micro is None or micro >= 1, "micro_batch_size", micro, "at least 1")
        whole = (self.optimizer, self.parallel) != ("muon", "fsdp")
        require(whole, "optimizer", self.optimizer, "adamw with fsdp: Muon needs whole matrices")
        require(self.clip_norm > 0, "clip_norm", self.clip_norm, "above 0")


def batch_indices(num_items: int, batch_size: int, step: int, seed: int) -> Tensor:
    """Which examples step 1, 2, … sees: consecutive pieces of one shuffled pass after another.

    Returns: [batch_size] int64; a batch may reach over the end of a pass into the next.
    """
    positions = torch.arange((step - 1) * batch_size, step * batch_size)
    rounds = positions // num_items
    indices = torch.empty_like(positions)
    for r in rounds.unique():
        indices[rounds == r] = _order(num_items, seed, int(r))[positions[rounds == r] % num_items]
    return indices


@lru_cache(maxsize=2)
def _order(num_items: int, seed: int, number: int) -> Tensor:
    """The order of one pass; kept, since shuffling 70 million takes seconds."""
    return torch.randperm(num_items, generator=generator_for(seed, "order", number))


def learning_rate(config: TrainingConfig, step: int) -> float:
    """Linear warm-up to the peak, then a cosine down to the final rate at `num_steps`."""
    if step < config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    share = (step - config.warmup_steps) / max(1, config.num_steps - config.warmup_steps)
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
    return config.final_learning_rate + (config.learning_rate - config.final_learning_rate) * fall
