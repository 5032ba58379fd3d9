"""What the denoiser knows of the tokenizer's codes before training. Axis words are those of `models.denoiser`."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class CodeTraits(nn.Module):
    """What is known of each code before training: its coordinates in the tokenizer's codebook, and their squares.

    Logits that are linear in both are those of a normal distribution over latents, coordinate by coordinate: "a light red,
    sure of it, of unknown texture". Rows of the token table and of the head are traits times a learned matrix, plus weights
    of their own; so codes that look alike start alike, and what is learned of one holds for its like. VQ-Diffusion learns
    every code from nothing.

    Differs from the paper, whose transformer learns the codes by their numbers alone.
    """

    def __init__(self, vocab_size: int, code_dim: int, *, table_width: int, head_width: int, at_once: int) -> None:
        """Args: at_once: tokens that one row of the head's input predicts."""
        super().__init__()
        traits = 2 * code_dim
        self.register_buffer("traits", torch.zeros(vocab_size, traits))
        self.traits: Tensor
        self.table = nn.Linear(traits, table_width, bias=False)
        self.head = nn.Linear(head_width, at_once * traits, bias=False)

    def take(self, codes: Float[Tensor, "vocab code_dim"]) -> None:
        """Read the traits off a codebook."""
        self.traits.copy_(traits_of(codes))

    def table_rows(self) -> Float[Tensor, "codes table_width"]:
        """To be added to the token table; [MASK] has no traits."""
        return functional.pad(self.table(self.traits), (0, 0, 0, 1))

    def head_rows(self) -> Float[Tensor, "logits head_width"]:
        """To be added to the weight of the head."""
        per_token = rearrange(self.head.weight, "(q t) w -> q t w", t=self.traits.shape[1])
        return torch.matmul(self.traits, per_token).flatten(0, 1)


def traits_of(codes: Float[Tensor, "vocab code_dim"]) -> Float[Tensor, "vocab traits"]:
    """Each coordinate of a codebook, then each squared, all brought to mean 0 and deviation 1."""
    centered = codes - codes.mean(0)
    traits = torch.cat([centered, centered.square()], dim=1)
    return (traits - traits.mean(0)) / traits.std(0).clamp_min(1e-6)
