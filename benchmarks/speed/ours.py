"""Our denoiser with random weights, and the sampler that draws with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from knn_diffusion.diffusion.conditioning import make_condition, with_null
from knn_diffusion.diffusion.plan import SamplerConfig
from knn_diffusion.diffusion.process import Schedule
from knn_diffusion.diffusion.sampling import sample
from knn_diffusion.diffusion.step import Step, reverse_step
from knn_diffusion.models.denoiser import PAPER, Denoiser, DenoiserConfig
from knn_diffusion.models.tokenizer import PAPER as PAPER_TOKENIZER
from knn_diffusion.models.tokenizer import VQGAN, TokenizerConfig
from knn_diffusion.presets import DENOISERS
from knn_diffusion.randomness import generator_for

SIZES = {
    "tiny": DenoiserConfig(vocab_size=64, grid=8, width=64, depth=2, heads=4, condition_dim=32, num_steps=100),
    "small": DenoiserConfig(vocab_size=1024, grid=16, width=256, depth=8, heads=4, condition_dim=384, num_steps=100),
    "stickers": DENOISERS["stickers"].denoiser,
    "paper": PAPER,
}
GUIDANCE_SCALE = 8.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Draw:
    """What is drawn at once."""

    config: DenoiserConfig
    steps: int
    batch: int = 1
    neighbors: int = 10

    def with_grid(self, grid: int) -> Draw:
        """Of another number of tokens."""
        return replace(self, config=replace(self.config, grid=grid))


def decoder_run(draw: Draw, device: torch.device) -> Callable[[int], Tensor]:
    """A batch of tokens to pixels by a tokenizer of the size, as a function of a seed; float32, as the pipeline decodes."""
    grid, vocab_size = draw.config.grid, draw.config.vocab_size
    small = TokenizerConfig(image_size=4 * grid, grid=grid, vocab_size=vocab_size, code_dim=16, channels=32)
    torch.manual_seed(0)
    tokenizer = VQGAN(PAPER_TOKENIZER if draw.config == PAPER else small).eval().to(device)

    @torch.inference_mode()
    def run(seed: int) -> Tensor:
        tokens = torch.randint(0, vocab_size, (draw.batch, grid**2), generator=generator_for(seed))
        return tokenizer.decode(tokens.to(device)).cpu()

    return run


def our_run(draw: Draw, device: torch.device, dtype: torch.dtype, step: Step = reverse_step) -> Callable[[int], Tensor]:
    """A batch from its embeddings to its tokens, as a function of a seed; ancestral order, truncation off.

    Keys and values of the condition are made anew for each batch.
    """
    torch.manual_seed(0)
    config = draw.config
    denoiser = Denoiser(config).eval().to(device, dtype)
    schedule = Schedule(num_steps=config.num_steps, vocab_size=config.vocab_size, preset="released")
    sampler = SamplerConfig(num_steps=draw.steps, order="ancestral", guidance_scale=GUIDANCE_SCALE)

    @torch.inference_mode()
    def run(seed: int) -> Tensor:
        shape = (draw.batch, 1 + draw.neighbors, config.condition_dim)
        y = nn.functional.normalize(torch.randn(shape), dim=-1).to(device)
        both = denoiser.prepare(with_null(make_condition(y[:, 0], y[:, 1:])))
        generators = [generator_for(seed, number) for number in range(draw.batch)]
        place: dict[str, Any] = {"grid": config.grid, "generators": generators, "device": device, "step": step}
        given = both.select(slice(0, draw.batch))
        return sample(denoiser, schedule, given, both, config=sampler, **place).cpu()

    return run
