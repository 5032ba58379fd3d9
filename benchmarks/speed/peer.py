"""diffusers' VQDiffusionPipeline around a transformer of our shape, its text encoder and image decoder costing nothing."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from knn_diffusion.models.denoiser import DenoiserConfig


class Stub(nn.Module):
    """A part of the peer's pipeline that costs nothing; its weights only say where the pipeline runs."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.states = nn.Parameter(torch.randn(shape))

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs."""
        return self.states.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.states.dtype


class StubTextEncoder(Stub):
    """Random states of the condition's shape in place of CLIP's."""

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        """The same states for every prompt."""
        return (self.states,)


class StubDecoder(Stub):
    """An image decoder that returns the tokens as an image of one channel."""

    config = SimpleNamespace(vq_embed_dim=1)
    quantize = SimpleNamespace(get_codebook_entry=lambda tokens, shape: tokens.float().reshape(shape))

    def decode(self, embeddings: Tensor, force_not_quantize: bool) -> SimpleNamespace:
        """Channels first, as the pipeline expects."""
        return SimpleNamespace(sample=embeddings.permute(0, 3, 1, 2))


class StubTokenizer:
    """Token ids nobody reads."""

    def __init__(self, slots: int) -> None:
        self.model_max_length = slots

    def __call__(self, prompt: str, **options: Any) -> SimpleNamespace:
        """As many ids as there are slots."""
        return SimpleNamespace(input_ids=torch.zeros(1, self.model_max_length, dtype=torch.long))


def peer_run(
    config: DenoiserConfig, steps: int, device: torch.device, dtype: torch.dtype, *, slots: int, guidance_scale: float
) -> Callable[[int], Any]:
    """One image by diffusers' pipeline around a transformer of the same shape, as a function of a seed."""
    from diffusers import Transformer2DModel, VQDiffusionPipeline, VQDiffusionScheduler
    from diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion import (
        LearnedClassifierFreeSamplingEmbeddings,
    )
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it warns about its own deprecated parts
    torch.manual_seed(0)
    pipe = VQDiffusionPipeline(
        vqvae=StubDecoder(1),
        text_encoder=StubTextEncoder(1, slots, config.condition_dim),
        tokenizer=StubTokenizer(slots),
        transformer=Transformer2DModel(
            num_attention_heads=config.heads,
            attention_head_dim=config.width // config.heads,
            num_layers=config.depth,
            cross_attention_dim=config.condition_dim,
            attention_bias=True,
            num_vector_embeds=config.vocab_size + 1,
            sample_size=config.grid,
            num_embeds_ada_norm=config.num_steps,
            norm_type="ada_norm",
            activation_fn="geglu-approximate",  # VQ-Diffusion's GELU, without a gate in spite of its name
        ).eval(),
        scheduler=VQDiffusionScheduler(num_vec_classes=config.vocab_size + 1, num_train_timesteps=config.num_steps),
        learned_classifier_free_sampling_embeddings=LearnedClassifierFreeSamplingEmbeddings(
            learnable=True, hidden_size=config.condition_dim, length=slots
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device, dtype)

    def run(seed: int) -> Any:
        generator = torch.Generator(device).manual_seed(seed)
        return pipe("", num_inference_steps=steps, guidance_scale=guidance_scale, generator=generator, output_type="np")

    return run
