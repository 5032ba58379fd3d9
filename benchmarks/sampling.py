"""Claim: at equal layers, width, tokens and steps, sampling is at least 1.8× as fast as diffusers' VQDiffusionPipeline.

    python benchmarks/sampling.py [--size small|paper] [--steps 16] [--peer-steps 100] [--json]

Both systems have random weights and the same number of blocks, heads, tokens, codes and condition slots, and draw one image
with guidance (λ = 8), truncation off, ancestral order. Measured is everything between the condition and the tokens, per
image: the peer is driven through its own `VQDiffusionPipeline.__call__`, with a text encoder and an image decoder that cost
nothing, so that neither side's stands in the figure. Our side makes its cross-attention keys and values anew for each image.
The peer computes in float32, as it is shipped; its time in bfloat16 stands beside, where ours is bfloat16 too.
Runs of both alternate, and the fastest of each counts, since a shared machine only ever adds time.

With --peer-steps 100 both draw what benchmarks/few_steps.py finds to be of equal quality: the peer's only order needs all
steps of the chain, which it skips without the exact posterior. The claim is then at least 6×.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import subprocess
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from knn_diffusion.device import choose_device, choose_dtype
from knn_diffusion.diffusion.conditioning import make_condition, null_condition
from knn_diffusion.diffusion.process import Schedule
from knn_diffusion.diffusion.sampling import SamplerConfig, sample
from knn_diffusion.models.cross_attention import PreparedCondition
from knn_diffusion.models.denoiser import PAPER, Denoiser, DenoiserConfig
from knn_diffusion.randomness import generator_for

SIZES = {
    "small": DenoiserConfig(vocab_size=1024, grid=16, width=256, depth=8, heads=4, condition_dim=384, num_steps=100),
    "paper": PAPER,
}
NEIGHBORS = 10
GUIDANCE_SCALE = 8.0


def our_run(config: DenoiserConfig, steps: int, device: torch.device, dtype: torch.dtype) -> Callable[[int], Tensor]:
    """One image from its embeddings to its tokens, by this package."""
    torch.manual_seed(0)
    denoiser = Denoiser(config).eval().to(device, dtype)
    schedule = Schedule(num_steps=config.num_steps, vocab_size=config.vocab_size, preset="released")
    sampler = SamplerConfig(num_steps=steps, order="ancestral", guidance_scale=GUIDANCE_SCALE)

    @torch.inference_mode()
    def run(seed: int) -> Tensor:
        y = nn.functional.normalize(torch.randn(1, 1 + NEIGHBORS, config.condition_dim), dim=-1).to(device)
        condition = make_condition(y[:, 0], y[:, 1:])
        given, null = denoiser.prepare(condition), denoiser.prepare(null_condition(condition))
        both = PreparedCondition.cat([given, null])
        place: dict[str, Any] = {"grid": config.grid, "generators": [generator_for(seed)], "device": device}
        return sample(denoiser, schedule, given, both, config=sampler, **place).cpu()

    return run


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

    model_max_length = 1 + NEIGHBORS

    def __call__(self, prompt: str, **options: Any) -> SimpleNamespace:
        """As many ids as there are slots."""
        return SimpleNamespace(input_ids=torch.zeros(1, self.model_max_length, dtype=torch.long))


def peer_run(config: DenoiserConfig, steps: int, device: torch.device, dtype: torch.dtype) -> Callable[[int], Any]:
    """One image by diffusers' pipeline around a transformer of the same shape."""
    from diffusers import Transformer2DModel, VQDiffusionPipeline, VQDiffusionScheduler
    from diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion import (
        LearnedClassifierFreeSamplingEmbeddings,
    )

    torch.manual_seed(0)
    pipe = VQDiffusionPipeline(
        vqvae=StubDecoder(1),
        text_encoder=StubTextEncoder(1, 1 + NEIGHBORS, config.condition_dim),
        tokenizer=StubTokenizer(),
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
            learnable=True, hidden_size=config.condition_dim, length=1 + NEIGHBORS
        ),
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device, dtype)

    def run(seed: int) -> Any:
        generator = torch.Generator(device).manual_seed(seed)
        return pipe("", num_inference_steps=steps, guidance_scale=GUIDANCE_SCALE, generator=generator, output_type="np")

    return run


def fastest(runs: dict[str, Callable[[int], Any]], repeats: int) -> dict[str, float]:
    """Seconds of the fastest run of each, taken in turns after one warm-up."""
    seconds = dict.fromkeys(runs, float("inf"))
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run(repeat)
            if repeat > 0:
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def hardware(device: torch.device) -> str:
    """The GPU, or the CPU with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"


def commit() -> str:
    """Of the package, short."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--peer-steps", type=int, help="steps of the peer; as many as ours by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # the peer warns about its own deprecated parts
    warnings.simplefilter("ignore")

    peer_steps = args.peer_steps or args.steps
    config, device = SIZES[args.size], choose_device(args.device)
    dtype = choose_dtype(device)
    runs: dict[str, Callable[[int], Any]] = {
        "ours": our_run(config, args.steps, device, dtype),
        "peer": peer_run(config, peer_steps, device, torch.float32),
    }
    if dtype != torch.float32:
        runs["peer_same_precision"] = peer_run(config, peer_steps, device, dtype)
    seconds = fastest(runs, args.repeats)
    report = {
        "peer_name": f"diffusers {version('diffusers')} VQDiffusionPipeline",
        "commit": commit(),
        "hardware": hardware(device),
        "torch": torch.__version__,
        "precision": {"ours": str(dtype).removeprefix("torch."), "peer": "float32"},
        "size": args.size,
        "depth": config.depth,
        "width": config.width,
        "tokens": config.seq,
        "vocab_size": config.vocab_size,
        "slots": 1 + NEIGHBORS,
        "steps": args.steps,
        "peer_steps": peer_steps,
        "seconds_per_image": {name: round(value, 4) for name, value in seconds.items()},
        "ratio": round(seconds["peer"] / seconds["ours"], 2),
    }
    if args.json:
        print(json.dumps(report))
        return
    for name, value in report.items():
        print(f"{name:18} {value}")


if __name__ == "__main__":
    main()
