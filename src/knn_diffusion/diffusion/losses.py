"""The training loss of Algorithm 1: L_0 at the first step, L_{n-1} + ξ L_x0 at the others, and how steps are drawn.

The loss is computed in closed form from a few numbers for each token: the posterior of Eq. 3 depends on the prediction only
through p(x_0), p(x_n) and, where codes are replaced in earnest, one sum over the other codes. So nothing in float64 is ever as
large as the vocabulary. Tests hold the closed form to the dense float64 definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from knn_diffusion.config import config, require
from knn_diffusion.diffusion.process import Schedule, categorical
from knn_diffusion.shapes import Logits, Steps, Tokens

WARM_DRAWS = 10
"""Draws of every step before importance sampling begins (VQ-Diffusion)."""

MEMORY = 0.9
"""What one new loss leaves of the old average in importance sampling (VQ-Diffusion)."""

SMALLEST_WEIGHT = 1e-4
"""Added to every step's weight in importance sampling, so that none is forgotten (VQ-Diffusion)."""


@config
class LossConfig:
    """How the parts of Algorithm 1's loss are weighed."""

    aux_weight: float = 5e-4
    """ξ, weight of L_x0, at least 0; VQ-Diffusion's value for text-to-image."""
    adaptive_aux: bool = True
    """Whether ξ is multiplied by 2 - (n - 1) / N, heavier where little noise is left to undo (VQ-Diffusion)."""

    def __post_init__(self) -> None:
        require(self.aux_weight >= 0, "aux_weight", self.aux_weight, "at least 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class DiffusionLoss:
    """The loss to minimise, and its parts for each image in nats per token, before division by their step's probability."""

    total: Float[Tensor, ""]
    l_0: Float[Tensor, "batch"]
    """-log p(x_0 | x_1) where n = 1, else 0."""
    l_prev: Float[Tensor, "batch"]
    """L_{n-1}: KL of the true posterior from the predicted one where n > 1, else 0."""
    l_x0: Float[Tensor, "batch"]
    """-log p(x_0 | x_n), before ξ; the cross-entropy of the prediction, of tokens whose x_0 is not certain from x_n."""

    @property
    def bound(self) -> Float[Tensor, "batch"]:
        """L_0 or L_{n-1} of each image, without gradient: what importance sampling follows."""
        return (self.l_0 + self.l_prev).detach()


def uncertain(schedule: Schedule, x_n: Tokens) -> Bool[Tensor, "batch seq"] | None:
    """The tokens whose prediction counts, None for all: with the absorbing schedule a visible token is certain."""
    return x_n == schedule.mask_id if schedule.preset == "absorbing" else None


def diffusion_loss(
    schedule: Schedule,
    logits: Logits | Float[Tensor, "asked vocab"],
    x_0: Tokens,
    x_n: Tokens,
    *,
    step: Steps,
    probability: Float[Tensor, "batch"],
    config: LossConfig,
) -> DiffusionLoss:
    """Lines 10-14 of Algorithm 1 for a batch.

    Args:
        logits: the denoiser's prediction of x_0 from x_n; of the `uncertain` tokens only, where there are certain ones.
        probability: with which each image's step was drawn.
    Returns: a total that estimates the variational bound in nats per token (plus the auxiliary part), whatever N is and
        however the steps were drawn.

    Differs from the paper: each image's loss is divided by its step's probability, as VQ-Diffusion does; with steps drawn
    uniformly this multiplies Algorithm 1's loss by N.
    """
    log_p = logits.float().log_softmax(-1)  # batch seq vocab, or asked vocab
    asked = uncertain(schedule, x_n)
    if asked is None:
        at_0 = _at(log_p, x_0)  # batch seq
        nll = -at_0
    else:  # a certain token gets any number in place of its prediction, and a loss of 0
        at_0 = torch.full(x_0.shape, -1.0, device=x_0.device).masked_scatter(asked, _at(log_p, x_0[asked]))
        nll = -at_0.masked_fill(~asked, 0)
    first = step == 1
    l_0 = torch.where(first, nll.mean(1), 0)
    l_prev = torch.where(first, 0, _divergence(schedule, log_p, at_0, x_0, x_n, step.clamp_min(2)).mean(1))
    l_x0 = nll.mean(1)
    emphasis = 2 - (step - 1) / schedule.num_steps if config.adaptive_aux else 1
    aux = torch.where(first, 0, config.aux_weight * emphasis * l_x0)
    total = ((l_0 + l_prev + aux) / probability.to(l_0)).mean()
    return DiffusionLoss(total=total, l_0=l_0, l_prev=l_prev, l_x0=l_x0)


def _at(values: Float[Tensor, "*tokens vocab"], token: Int[Tensor, "*tokens"]) -> Float[Tensor, "*tokens"]:
    return values.gather(-1, token.unsqueeze(-1)).squeeze(-1)


def _divergence(
    schedule: Schedule,
    log_p: Logits | Float[Tensor, "asked vocab"],
    at_0: Float[Tensor, "batch seq"],
    x_0: Tokens,
    x_n: Tokens,
    step: Steps,
) -> Float[Tensor, "batch seq"]:
    """KL(q(x_s | x_n, x_0) ‖ p(x_s | x_n)) of each token, s = n - 1 ≥ 1; float64 of [batch, seq], float32 where vocab joins.

    By Eq. 3 the true posterior at code j is w_j = ℓ_j a_j / e with a_j = (ᾱ_s [j = x_0] + β̄_s) R°, and the predicted one has
    u_j = ᾱ_s r_j + β̄_s R in place of a_j. Here ℓ_j = q(x_n | x_s = j), e = q(x_n | x_0) for an x_0 other than x_n, r_j is p_j
    except r_{x_n} = κ p_{x_n} with κ = e / q(x_n | x_0 = x_n), and R = Σ r_j; R° is R for a certain prediction. So KL is
    Σ w_j (log a_j - log u_j). The class [MASK] cancels, and all codes but x_0 and x_n share one w and one a.
    Float32 knows 1 - p_{x_n} to 1e-7 only, which shows where `released` has replaced a token: for one in a million.
    """
    masked = x_n == schedule.mask_id
    hidden = masked | (schedule.preset == "absorbing")  # a certain token is computed as if hidden, then set to 0
    visible = torch.where(hidden, x_0, x_n)
    same = ~hidden & (visible == x_0)
    differs = ~hidden & (visible != x_0)
    now, before = schedule.marginal(step[:, None]), schedule.marginal(step[:, None] - 1)
    between = schedule.transition(step[:, None] - 1, step[:, None])

    kept = between.alpha + between.beta
    likelihood = torch.where(hidden, between.gamma, between.beta)  # ℓ_j for j other than x_n
    evidence = torch.where(hidden, now.gamma, now.beta)  # e
    ratio = torch.where(hidden, 1, now.beta / (now.alpha + now.beta))  # κ
    p_0 = at_0.double()  # log-probabilities
    p_n = p_0 if schedule.preset == "absorbing" else _at(log_p, visible).double()  # there `visible` is x_0 everywhere
    mass = ratio * p_n.exp() - torch.expm1(p_n)  # R
    true_mass = torch.where(same, ratio, 1)  # R°
    floor = before.beta.log() + mass.log()  # log u_j where p_j = 0

    w_0 = torch.where(same, kept, likelihood) * (before.alpha + before.beta) * true_mass / evidence
    a_0 = (before.alpha + before.beta).log() + true_mass.log()
    u_0 = torch.logaddexp(before.alpha.log() + p_0 + true_mass.log(), floor)
    divergence = w_0 * (a_0 - u_0)
    if schedule.preset == "absorbing":
        return torch.where(masked, divergence, 0).float()

    w_n = kept * before.beta / evidence
    u_n = torch.logaddexp(before.alpha.log() + p_n + ratio.log(), floor)
    divergence = divergence + torch.where(differs, w_n * (before.beta.log() - u_n), 0)
    if schedule.replaces:  # in `released` the other codes hold a millionth of the mass, at most 3e-5 nats
        w_j = likelihood * before.beta * true_mass / evidence
        slope = before.alpha / (before.beta * mass)
        above = torch.log1p(slope.unsqueeze(-1).float() * log_p.exp()).sum(-1) - torch.log1p(slope * p_0.exp())
        above = above - torch.where(differs, torch.log1p(slope * p_n.exp()), 0)  # Σ_j log u_j - floor
        others = schedule.vocab_size - 1 - differs.long()
        divergence = divergence + w_j * (others * (true_mass.log() - mass.log()) - above)
    return divergence.float()


class StepSampler(nn.Module):
    """Draws the step n of each training image; its memory is made of buffers, so it is checkpointed with the model.

    `uniform` is Algorithm 1's line 8. `importance` is VQ-Diffusion's: steps in proportion to the root of their mean squared
    loss, once every step has been drawn more than ten times; before that, uniform.

    Differs from the paper: it draws uniformly, its base VQ-Diffusion by importance; both are here.
    """

    mean_square: Float[Tensor, "num_steps"]
    draws: Int[Tensor, "num_steps"]

    def __init__(self, num_steps: int, kind: Literal["uniform", "importance"] = "uniform") -> None:
        super().__init__()
        require(num_steps >= 2, "num_steps", num_steps, "at least 2")
        require(kind in ("uniform", "importance"), "kind", kind, "uniform or importance")
        self.num_steps = num_steps
        self.kind = kind
        self.register_buffer("mean_square", torch.zeros(num_steps))
        self.register_buffer("draws", torch.zeros(num_steps, dtype=torch.long))

    def probabilities(self) -> Float[Tensor, "num_steps"]:
        """Chance of each step 1 … N to be drawn now, float64."""
        if self.kind == "uniform" or bool((self.draws <= WARM_DRAWS).any()):
            return torch.full((self.num_steps,), 1 / self.num_steps, dtype=torch.float64, device=self.draws.device)
        weight = self.mean_square.double().sqrt() + SMALLEST_WEIGHT
        weight[0] = weight[1]  # L_0 is on another scale
        return weight / weight.sum()

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Steps, Float[Tensor, "batch"]]:
        """Draw a step for each image; returns the steps and the float64 probability each was drawn with."""
        probabilities = self.probabilities()
        index = categorical(probabilities.expand(batch, 1, -1), generator)[:, 0]
        return index + 1, probabilities[index]

    @torch.no_grad()
    def update(self, step: Steps, bound: Float[Tensor, "batch"]) -> None:
        """Remember the losses just seen (`DiffusionLoss.bound`); several of one step count by their mean."""
        index = (step - 1).to(self.draws.device)
        seen = torch.bincount(index, minlength=self.num_steps)
        total = torch.zeros_like(self.mean_square).index_add_(0, index, bound.to(self.mean_square).square())
        memory = MEMORY**seen
        self.mean_square.mul_(memory).add_((1 - memory) * total / seen.clamp_min(1))
        self.draws.add_(seen)
