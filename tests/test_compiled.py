"""A pass as one graph: the same tokens, few graphs, and an error that says what is missing.

Most graphs are only traced, not compiled to machine code: that takes no compiler and little time, and a trace of the whole pass
fails wherever a value is read from a tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency
from tiny_world import build_model, draw_pictures
from torch import Tensor

from knn_diffusion import KnnDiffusion, pipeline
from knn_diffusion.diffusion import compiled
from knn_diffusion.diffusion.compiled import CompiledStep, rounded
from knn_diffusion.diffusion.conditioning import make_condition, with_null
from knn_diffusion.diffusion.plan import SamplerConfig
from knn_diffusion.diffusion.process import Preset, Schedule, q_sample
from knn_diffusion.diffusion.sampling import StepInfo, sample
from knn_diffusion.diffusion.step import Step, reverse_step
from knn_diffusion.errors import MissingDependencyError, UsageError
from knn_diffusion.models.denoiser import Denoiser, DenoiserConfig
from knn_diffusion.randomness import generator_for

CPU = torch.device("cpu")
GRID, VOCAB, STEPS = 4, 12, 20
TINY = DenoiserConfig(
    vocab_size=VOCAB, grid=GRID, width=16, depth=1, heads=2, condition_dim=8, num_steps=STEPS, map_width=8, code_dim=4
)
pytestmark = pytest.mark.usefixtures("unchecked_shapes")
ORDERS = ("ancestral", "halton", "confidence")


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    """With predictions that are far from uniform."""
    torch.manual_seed(0)
    made = Denoiser(TINY).eval().requires_grad_(False)
    made.head.weight.mul_(10)
    return made


class Traced:
    """A backend that runs what was traced, and counts its graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1
        return graph.forward


@torch.inference_mode()
def draw(
    denoiser: Denoiser,
    step: Step,
    sampler: SamplerConfig,
    *,
    preset: Preset = "absorbing",
    count: int = 2,
    first: int = 0,
    start_step: int | None = None,
    callback: Callable[[StepInfo], None] | None = None,
) -> Tensor:
    """Images with numbers from `first` on."""
    schedule = Schedule(num_steps=STEPS, vocab_size=VOCAB, preset=preset)
    y = torch.nn.functional.normalize(torch.randn(1, 3, 8, generator=generator_for("y")), dim=-1).expand(count, -1, -1)
    both = denoiser.prepare(with_null(make_condition(y[:, 0], y[:, 1:])))
    generators = [generator_for("image", number) for number in range(first, first + count)]
    x_start = None
    if start_step is not None:
        image = torch.randint(VOCAB, (count, GRID**2), generator=generator_for("start"))
        x_start = q_sample(schedule, image, torch.full((count,), start_step), generators)
    given = both.select(slice(0, count))
    return sample(
        denoiser, schedule, given, both, config=sampler, grid=GRID, generators=generators, step=step,
        x_start=x_start, start_step=start_step, callback=callback,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("order", "preset"),
    [
        ("ancestral", "released"),
        ("halton", "mask-and-replace"),
        ("halton", "absorbing"),
        ("confidence", "mask-and-replace"),
        ("confidence", "absorbing"),
    ],
)
def test_the_traced_pass_draws_the_same_tokens(denoiser: Denoiser, order: Any, preset: Preset) -> None:
    sampler = SamplerConfig(num_steps=6, order=order, truncation=0.95)
    step = CompiledStep(CPU, backend="eager")
    for start_step in (None, 14):
        plain, traced = (
            draw(denoiser, how, sampler, preset=preset, start_step=start_step) for how in (reverse_step, step)
        )
        assert torch.equal(plain, traced)


@pytest.mark.parametrize(("order", "graphs"), [("ancestral", 1), ("halton", 2), ("confidence", 2)])
def test_passes_share_their_graphs_whatever_steps_seed_and_guidance(
    denoiser: Denoiser, order: Any, graphs: int
) -> None:
    """Halton changes up to a quarter of the tokens, then up to a half; confidence all or a half."""
    traced = Traced()
    step = CompiledStep(CPU, backend=traced)
    sampler = SamplerConfig(num_steps=5, order=order)
    draw(denoiser, step, sampler, count=1)
    assert traced.graphs == graphs
    draw(denoiser, step, sampler, count=1, first=7)
    other = replace(sampler, num_steps=8, guidance_scale=3.0, temperature=0.7, choice_temperature=1.0)
    draw(denoiser, step, other, count=1)
    assert traced.graphs == graphs


def test_guided_and_unguided_passes_are_two_graphs(denoiser: Denoiser) -> None:
    traced = Traced()
    sampler = SamplerConfig(
        num_steps=6, order="ancestral", guidance_schedule="interval", guidance_interval=(0.3, 0.7), guidance_scale=5.0
    )
    drawn = draw(denoiser, CompiledStep(CPU, backend=traced), sampler)
    assert traced.graphs == 2
    assert torch.equal(drawn, draw(denoiser, reverse_step, sampler))


def test_many_kinds_of_passes_are_compiled_but_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself torch would end the ninth with an error of many lines."""
    schedule = Schedule(num_steps=STEPS, vocab_size=VOCAB, preset="absorbing")
    step = CompiledStep(CPU, backend="eager")

    def images(count: int) -> Tensor:
        return sample(
            lambda x_n, step, y: torch.zeros(*x_n.shape, VOCAB), schedule, None, None, step=step, grid=2,
            config=SamplerConfig(num_steps=1, order="ancestral", guidance_scale=1.0),
            generators=[generator_for(number) for number in range(count)],
        )  # fmt: skip

    for count in range(1, 11):
        assert len(images(count)) == count
    monkeypatch.setattr(compiled, "MAX_GRAPHS", 3)
    with pytest.raises(
        UsageError, match="expected at most 3 kinds of passes to compile, got one more: draw with fewer"
    ):
        images(11)


def test_a_chain_survives_graphs_that_write_to_the_same_memory_again(denoiser: Denoiser) -> None:
    """So do captured graphs; and what a callback was told stays what it was."""

    def captured(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        memory: list[Tensor] = []

        def replay(*args: Tensor) -> list[Tensor]:
            made = graph.forward(*args)
            if not memory:
                memory.extend(torch.empty_like(one) for one in made)
            for place, one in zip(memory, made, strict=True):
                place.copy_(one)
            return memory

        return replay

    sampler = SamplerConfig(num_steps=6, order="ancestral")
    told: dict[str, list[StepInfo]] = {"plain": [], "captured": []}
    plain = draw(denoiser, reverse_step, sampler, callback=told["plain"].append)
    step = CompiledStep(torch.device("cuda"), backend=captured)
    assert torch.equal(draw(denoiser, step, sampler, callback=told["captured"].append), plain)
    for one, other in zip(told["plain"], told["captured"], strict=True):
        assert torch.equal(one.x_n, other.x_n)
        assert torch.equal(one.logits, other.logits)


def test_places_are_rounded_up_to_parts_of_the_grid() -> None:
    assert [rounded(places, 16) for places in (1, 4, 5, 8, 9, 16)] == [4, 4, 8, 8, 16, 16]
    assert [rounded(places, 9) for places in (3, 4, 5, 6)] == [3, 5, 5, 9]


def test_a_pipeline_compiles_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build_model(tmp_path / "tiny", draw_pictures(tmp_path / "pictures"))
    traced = Traced()
    monkeypatch.setattr(pipeline, "CompiledStep", lambda device: CompiledStep(device, backend=traced))
    plain, faster = (KnnDiffusion.from_pretrained(folder, device="cpu", compile=one) for one in (False, True))
    for ask in (lambda pipe: pipe("a cat"), lambda pipe: pipe.edit(tmp_path / "pictures" / "red-bar.png", "a cat")):
        images = [np.asarray(ask(pipe).images[0]) for pipe in (plain, faster)]
        assert np.array_equal(*images)
    assert traced.graphs > 0


def test_a_missing_compiler_is_named_in_one_line(denoiser: Denoiser) -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    def missing(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        raise InvalidCxxCompiler("c++")

    with pytest.raises(
        MissingDependencyError, match=r"expected torch.compile to work here, got .*c\+\+.*: install"
    ) as e:
        draw(denoiser, CompiledStep(CPU, backend=missing), SamplerConfig(num_steps=2))
    assert "\n" not in str(e.value)


def test_memory_that_runs_out_while_compiling_is_no_missing_compiler(denoiser: Denoiser) -> None:
    def full(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        draw(denoiser, CompiledStep(CPU, backend=full), SamplerConfig(num_steps=2))


def test_a_torch_that_cannot_compile_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("torch.compile is not supported on Python 9\nor so")

    monkeypatch.setattr(torch, "compile", refuse)
    with pytest.raises(MissingDependencyError, match="got 'torch.compile is not supported on Python 9': install"):
        CompiledStep(CPU)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_compiled_code_draws_the_same_tokens_in_float32(denoiser: Denoiser, order: Any) -> None:
    sampler = SamplerConfig(num_steps=6, order=order)
    greedy = replace(sampler, temperature=1e-4, choice_temperature=0.0)
    step = CompiledStep(CPU)
    for one in (sampler, greedy):
        assert torch.equal(*(draw(denoiser, how, one, count=64) for how in (reverse_step, step)))


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
def test_compiled_code_draws_from_the_same_distribution_in_bfloat16(denoiser: Denoiser, order: Any) -> None:
    """At every position a χ² test of 2,000 images against 2,000 others: no p below one in a thousand, shared among 16 tests.

    The same images, from the same uniform numbers, agree in at least 95 % of their tokens.
    """
    half = Denoiser(TINY).eval().requires_grad_(False)
    half.load_state_dict(denoiser.state_dict())
    half = half.to(torch.bfloat16)
    sampler, step = SamplerConfig(num_steps=6, order=order, guidance_scale=2.0), CompiledStep(CPU)
    plain = draw(half, reverse_step, sampler, count=2000)
    others, same = (draw(half, step, sampler, count=2000, first=first) for first in (2000, 0))
    assert (plain == same).float().mean() >= 0.95
    for position in range(GRID**2):
        table = torch.stack([torch.bincount(drawn[:, position], minlength=VOCAB) for drawn in (plain, others)]).numpy()
        p_value = chi2_contingency(table[:, table.sum(0) > 0]).pvalue
        assert p_value > 0.001 / GRID**2
