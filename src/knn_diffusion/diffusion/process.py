"""The forward process and its posterior: Eqs. 1, 2 and 3, for any pair of steps.

A token is kept, replaced by a code drawn uniformly, or replaced by [MASK], which it never leaves (Eq. 2). Every product of
such matrices has the same form, so three numbers describe the way from any step to any later one: see `Rates`.

Steps run 1 … N; step 0 is the clean image. The id of [MASK] is `vocab_size`. Tables and posteriors are float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from knn_diffusion.config import config, require
from knn_diffusion.errors import UsageError
from knn_diffusion.randomness import rand
from knn_diffusion.shapes import Steps, Tokens

Generators = torch.Generator | Sequence[torch.Generator]
"""One generator for a whole batch, or one for each image, so that an image does not depend on its batch."""

Preset = Literal["released", "mask-and-replace", "absorbing"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """The matrix α I + β 11ᵀ over the codes, with a row γ for [MASK] (Eq. 2); α + V β + γ = 1.

    `alpha` is the chance to be kept, `beta` to become one given code, `gamma` to become [MASK].
    """

    alpha: Float[Tensor, "*any"]
    beta: Float[Tensor, "*any"]
    gamma: Float[Tensor, "*any"]

    def at(self, index: int) -> Rates:
        """One of several."""
        return Rates(alpha=self.alpha[index], beta=self.beta[index], gamma=self.gamma[index])

    def to(self, device: torch.device | str) -> Rates:
        """On this device."""
        return Rates(alpha=self.alpha.to(device), beta=self.beta.to(device), gamma=self.gamma.to(device))


@dataclass(frozen=True, kw_only=True, slots=True)
class Stride:
    """A way back from step n to an earlier s, as `Schedule.stride` checked it: all that the posterior knows of the steps."""

    now: Rates
    """Q̄_n."""
    before: Rates
    """Q̄_s."""
    between: Rates
    """Q_n ⋯ Q_{s+1}."""

    def at(self, index: int) -> Stride:
        """One of several."""
        return Stride(now=self.now.at(index), before=self.before.at(index), between=self.between.at(index))

    def to(self, device: torch.device | str) -> Stride:
        """On this device."""
        return Stride(now=self.now.to(device), before=self.before.to(device), between=self.between.to(device))


@config
class Schedule:
    """How fast an image is noised; kept with every checkpoint, since a denoiser knows no other schedule.

    Differs from the paper: it says "as defined in [16]", whose text and released constants disagree, so both are presets.
    """

    num_steps: int
    """N, steps from the image to the prior; at least 2."""
    vocab_size: int
    """V, codes of the tokenizer; at least 2."""
    preset: Preset = "released"
    """`released`: VQ-Diffusion's constants, a millionth replaced, so all but masking alone. `mask-and-replace`: nine tenths
    masked and one tenth uniform at N. `absorbing`: masking alone, a visible token is certain."""

    def __post_init__(self) -> None:
        require(self.num_steps >= 2, "num_steps", self.num_steps, "at least 2")
        require(self.vocab_size >= 2, "vocab_size", self.vocab_size, "at least 2")
        known = ("released", "mask-and-replace", "absorbing")
        require(self.preset in known, "preset", self.preset, f"one of {', '.join(known)}")

    @property
    def mask_id(self) -> int:
        """The token that stands for [MASK], one past the last code."""
        return self.vocab_size

    @property
    def replaces(self) -> bool:
        """Whether visible tokens are wrong often enough that a sampler should doubt them."""
        return self.preset == "mask-and-replace"

    @property
    def alpha_bar(self) -> Float[Tensor, "steps"]:
        """Chance that a token has been kept up to each step; entry 0 is 1."""
        return _cumulative(self, torch.device("cpu")).alpha

    @property
    def beta_bar(self) -> Float[Tensor, "steps"]:
        """Chance that a token has been replaced by one given code up to each step; entry 0 is 0."""
        return _cumulative(self, torch.device("cpu")).beta

    @property
    def gamma_bar(self) -> Float[Tensor, "steps"]:
        """Chance that a token is masked at each step; entry 0 is 0."""
        return _cumulative(self, torch.device("cpu")).gamma

    @property
    def alpha(self) -> Float[Tensor, "steps"]:
        """α_n of Eq. 2; entry 0 is 1."""
        return _single(self).alpha

    @property
    def beta(self) -> Float[Tensor, "steps"]:
        """β_n of Eq. 2; entry 0 is 0."""
        return _single(self).beta

    @property
    def gamma(self) -> Float[Tensor, "steps"]:
        """γ_n of Eq. 2; entry 0 is 0."""
        return _single(self).gamma

    def marginal(self, step: Int[Tensor, "*any"]) -> Rates:
        """The matrix Q̄_n = Q_n ⋯ Q_1 of Eq. 3, which noises a clean token up to `step`."""
        table = _cumulative(self, step.device)
        return Rates(alpha=table.alpha[step], beta=table.beta[step], gamma=table.gamma[step])

    def transition(self, prev_step: Int[Tensor, "*any"], step: Int[Tensor, "*any"]) -> Rates:
        """The matrix Q_n ⋯ Q_{s+1}, which noises from `prev_step` s to the later `step` n; Eq. 2 when they are neighbors."""
        before, after = self.marginal(prev_step), self.marginal(step)
        alpha = after.alpha / before.alpha
        unmasked = 1 - before.gamma
        beta = ((after.beta - alpha * before.beta) / unmasked).clamp_min(0)
        return Rates(alpha=alpha, beta=beta, gamma=(after.gamma - before.gamma) / unmasked)

    def stride(self, step: Int[Tensor, "*any"], prev_step: Int[Tensor, "*any"]) -> Stride:
        """The way back from `step` n, 1 … N, to `prev_step` s, 0 … n - 1.

        The checks wait for the device that holds the steps; what follows from the stride never does.

        Raises: UsageError for steps out of order or outside 0 … N.
        """
        _check_steps(self, step, at_least=1)
        _check_steps(self, prev_step, at_least=0)
        if bool((prev_step >= step).any()):
            raise UsageError(f"expected prev_step below step, got {prev_step.tolist()} and {step.tolist()}: swap them")
        return Stride(
            now=self.marginal(step), before=self.marginal(prev_step), between=self.transition(prev_step, step)
        )


@lru_cache(maxsize=64)
def _cumulative(schedule: Schedule, device: torch.device) -> Rates:
    """Q̄ for every step 0 … N."""
    with torch.inference_mode(False):  # cached tensors made in inference mode could never serve training
        share = torch.arange(schedule.num_steps + 1, dtype=torch.float64) / schedule.num_steps
        if schedule.preset == "released":
            steps = torch.linspace(0, 1, schedule.num_steps, dtype=torch.float64)
            start = torch.zeros(1, dtype=torch.float64)
            alpha_bar = torch.cat([start + 1, 0.99999 + (0.000009 - 0.99999) * steps])
            gamma_bar = torch.cat([start, 0.000009 + (0.99999 - 0.000009) * steps])
            uniform = 1 - alpha_bar - gamma_bar
        elif schedule.preset == "mask-and-replace":
            alpha_bar, gamma_bar, uniform = 1 - share, 0.9 * share, 0.1 * share
        else:
            alpha_bar, gamma_bar, uniform = 1 - share, share, 0 * share
        return Rates(
            alpha=alpha_bar.to(device), beta=(uniform / schedule.vocab_size).to(device), gamma=gamma_bar.to(device)
        )


@lru_cache(maxsize=64)
def _single(schedule: Schedule) -> Rates:
    """Q_n for every step 1 … N, behind an identity."""
    with torch.inference_mode(False):
        steps = torch.arange(schedule.num_steps + 1)
        return schedule.transition((steps - 1).clamp_min(0), steps)


def uniform(
    generators: Generators, batch: int, seq: int, device: torch.device | str = "cpu"
) -> Float[Tensor, "batch seq"]:
    """Float64 numbers in [0, 1), drawn where each generator lives and moved to `device`.

    Raises: UsageError when there is a list of generators that does not have one for each image.
    """
    if isinstance(generators, torch.Generator):
        return rand(batch, seq, generator=generators, dtype=torch.float64).to(device)
    if len(generators) != batch:
        raise UsageError(f"expected a generator for each of {batch} images, got {len(generators)}: pass one per image")
    rows = [torch.rand(seq, dtype=torch.float64, generator=one, device=one.device).to(device) for one in generators]
    return torch.stack(rows)


def categorical(weights: Float[Tensor, "batch seq classes"], generators: Generators) -> Int[Tensor, "batch seq"]:
    """Draw a class for every position, with chances in proportion to its float64 weights.

    Args:
        generators: advanced by one number for each position.
    """
    batch, seq, _ = weights.shape
    return pick(weights, uniform(generators, batch, seq, weights.device))


def pick(weights: Float[Tensor, "*any classes"], level: Float[Tensor, "*any"]) -> Int[Tensor, "*any"]:
    """The class where the cumulative distribution passes `level`, a number in [0, 1).

    One uniform number decides a position, and a class of probability 1e-12 still gets its share. (Gumbel noise made from
    float32 uniforms draws a class of 1e-7 half as often as it should.)
    """
    cumulative = weights.cumsum(-1)
    target = level.unsqueeze(-1) * cumulative[..., -1:]
    first = torch.searchsorted(cumulative, target, right=True).squeeze(-1)  # the first class whose sum exceeds it
    return first.clamp_max(weights.shape[-1] - 1)  # of weights that are NaN, none does


def q_sample(schedule: Schedule, x_0: Tokens, step: Steps, generators: Generators) -> Tokens:
    """Draw x_n from q(x_n | x_0) = v(x_n)ᵀ Q̄_n v(x_0) (Eq. 1, n times at once).

    Args:
        step: how far each image is noised, 0 … N.
        generators: advanced by two numbers for each token.
    Raises: UsageError for a step outside 0 … N.
    """
    _check_steps(schedule, step, at_least=0)
    batch, seq = x_0.shape
    fate, code = uniform(generators, batch, 2 * seq, x_0.device).chunk(2, dim=1)
    rates = schedule.marginal(step.to(x_0.device)[:, None])
    replacement = (code * schedule.vocab_size).long().to(x_0.dtype)
    unmasked = torch.where(fate < rates.gamma + rates.alpha, x_0, replacement)
    return torch.where(fate < rates.gamma, schedule.mask_id, unmasked)


def prior_sample(
    schedule: Schedule, batch: int, seq: int, generators: Generators, device: torch.device | str = "cpu"
) -> Tokens:
    """Draw x_N, where the reverse chain starts: all [MASK] (Algorithm 2, line 5), or the prior of `mask-and-replace`.

    Differs from the paper: a `mask-and-replace` chain starts with a tenth of the tokens drawn uniformly, as it was trained.
    """
    if not schedule.replaces:
        return torch.full((batch, seq), schedule.mask_id, dtype=torch.long, device=device)
    nothing = torch.zeros(batch, seq, dtype=torch.long, device=device)  # at N nothing is kept
    return q_sample(schedule, nothing, torch.full((batch,), schedule.num_steps, device=device), generators)


def posterior(
    schedule: Schedule,
    x_0_logits: Float[Tensor, "*any vocab"],
    x_n: Int[Tensor, "*any"],
    stride: Stride,
) -> Float[Tensor, "*any classes"]:
    """p(x_s | x_n): the posterior q(x_s | x_n, x_0) of Eq. 3, averaged over the predicted x_0, for any earlier step s.

    With s = n - 1 it is Eq. 3; with a larger stride it is the exact product of the steps between, so fewer steps than trained
    cost no bias: a masked token stays masked with probability γ̄_s / γ̄_n.

    By Eq. 3 code j has Σ_i p(x_0 = i) q(x_n | x_s = j) q(x_s = j | x_0 = i) / q(x_n | x_0 = i). All codes but the one that x_n
    shows share the numbers in this, so what is left is a · p_j + b, and one code more to be put in its place.

    Args:
        x_0_logits: the prediction after guidance and truncation; -inf is a class that cannot be.
        stride: from n to s, with rates that broadcast to x_n; at s = 0 the result is the prediction itself.
    Returns: float64 probabilities; the last class is [MASK].

    Differs from the paper: under `absorbing` a visible token is certain, so it stays, whatever the prediction.
    """
    now, before, between = stride.now, stride.before, stride.between
    hidden = x_n == schedule.mask_id
    p_x_0 = functional.pad(x_0_logits.double(), (0, 1), value=-math.inf).softmax(-1)  # *any classes; nothing on [MASK]
    own = p_x_0.gather(-1, x_n.unsqueeze(-1)).squeeze(-1)  # of the code that x_n shows
    if schedule.preset == "absorbing":
        scale, floor, stays = between.gamma / now.gamma * before.alpha, torch.zeros_like(own), torch.ones_like(own)
        scale = torch.where(hidden, scale, 0)
    else:
        kept = now.alpha + now.beta  # q(x_n | x_0 = x_n); now.beta for another x_0
        evidence = own / kept + (1 - own) / now.beta  # Σ_i p(x_0 = i) / q(x_n | x_0 = i)
        stays = (between.alpha + between.beta) * (before.alpha * own / kept + before.beta * evidence)
        scale = torch.where(hidden, between.gamma / now.gamma, between.beta / now.beta) * before.alpha
        floor = torch.where(hidden, between.gamma / now.gamma, between.beta * evidence) * before.beta
    stays = torch.where(hidden, before.gamma / now.gamma, stays)  # as [MASK], or as the code that it shows
    codes = torch.addcmul(floor.unsqueeze(-1), p_x_0, scale.unsqueeze(-1))
    codes[..., schedule.mask_id] = 0
    return codes.scatter_(-1, x_n.unsqueeze(-1), stays.unsqueeze(-1))


def _check_steps(schedule: Schedule, step: Int[Tensor, "*images"], *, at_least: int) -> None:
    """Refuse steps outside the tables; a negative one would silently read from their end."""
    if bool(((step < at_least) | (step > schedule.num_steps)).any()):
        raise UsageError(
            f"expected steps from {at_least} to {schedule.num_steps}, got {step.tolist()}: use this schedule's steps"
        )
