"""How the step enters the denoiser: as scale and shift of the norms before both attentions, AdaLN (A.2).

Axis words are those of `models.denoiser`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from knn_diffusion.shapes import Steps


class StepEmbedding(nn.Module):
    """The step n as a vector, shared by all norms: sinusoids of n / N through a small MLP.

    Differs from VQ-Diffusion, which keeps a table of N rows in every norm: neighboring steps denoise nearly the same
    mixture, so a smooth function of n learns from all of them, and a small model spends nothing on 2 · depth tables.
    """

    def __init__(self, num_steps: int, step_width: int) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.inner = nn.Linear(step_width, step_width)
        self.outer = nn.Linear(step_width, step_width)

    def forward(self, step: Steps) -> Float[Tensor, "batch step_width"]:
        """Embed steps 1 … N; the sinusoids are float32 whatever the weights are, since their phase goes to 100."""
        exponents = torch.linspace(0, -3, self.inner.in_features // 2, device=step.device, dtype=torch.float32)
        phase = 100 * (step / self.num_steps)[:, None] * 10**exponents  # batch step_width/2
        waves = torch.cat([phase.cos(), phase.sin()], dim=-1)  # batch step_width
        return functional.silu(self.outer(functional.silu(self.inner(waves.to(self.inner.weight.dtype)))))


class StepTable(nn.Module):
    """Scale and shift of every norm at every step, as VQ-Diffusion has them: all that its embedding of the step ends in.

    There a norm holds an embedding of N steps, a SiLU and a linear layer. The step is all they depend on, so a table of
    their results is the same network.
    """

    def __init__(self, num_steps: int, depth: int, width: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(num_steps, depth, 4, width))
        nn.init.normal_(self.table, std=0.1)

    def forward(self, step: Steps) -> Float[Tensor, "batch scales_shifts"]:
        """Rows of steps 1 … N."""
        return functional.embedding(step - 1, self.table.flatten(1))


def adaptive_norm(
    h: Float[Tensor, "batch places width"], scale: Float[Tensor, "batch 1 width"], shift: Float[Tensor, "batch 1 width"]
) -> Float[Tensor, "batch places width"]:
    """AdaLN: LayerNorm without weights of its own, then the scale and shift of the step (A.2)."""
    return torch.addcmul(shift, functional.layer_norm(h, h.shape[-1:]), 1 + scale)
