"""A pass of the chain reads nothing back from its tensors, and computes no more of them than it must."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from knn_diffusion.diffusion import sampling
from knn_diffusion.diffusion.conditioning import make_condition, with_null
from knn_diffusion.diffusion.plan import SamplerConfig, passes, plan
from knn_diffusion.diffusion.process import Preset, Schedule, q_sample
from knn_diffusion.diffusion.step import Way, reverse_step
from knn_diffusion.models.denoiser import Denoiser, DenoiserConfig
from knn_diffusion.randomness import generator_for

PRESETS = ("released", "mask-and-replace", "absorbing")
ORDERS = ("ancestral", "halton", "confidence")
GRID, VOCAB, STEPS = 4, 12, 20
TINY = DenoiserConfig(
    vocab_size=VOCAB, grid=GRID, width=16, depth=2, heads=2, condition_dim=8, num_steps=STEPS, map_width=8, code_dim=4
)
READS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "masked_scatter",
    "is_nonzero",
    "unique",
    "repeat_interleave",
)
every_chain = pytest.mark.parametrize(("preset", "order"), list(itertools.product(PRESETS, ORDERS)))


def generators(count: int = 2) -> list[torch.Generator]:
    return [generator_for("test", number) for number in range(count)]


class Watched(TorchDispatchMode):
    """Writes down every operation since the first pass, with the devices that it touches."""

    def __init__(self) -> None:
        super().__init__()
        self.begun = False
        self.operations: list[tuple[str, set[str]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if self.begun:
            tensors = [one for one in (*args, made) if isinstance(one, Tensor)]
            masks = [one for many in args if isinstance(many, list | tuple) for one in many if isinstance(one, Tensor)]
            name = (
                "nonzero" if any(one.dtype == torch.bool for one in masks) else func.name().split("::")[1].split(".")[0]
            )
            self.operations.append((name, {one.device.type for one in tensors}))
        return made


def chain(preset: Preset, order: str, device: str, **start: Any) -> Watched:
    """A guided chain of two images on a device whose tensors have no values, or on the host."""
    schedule = Schedule(num_steps=STEPS, vocab_size=VOCAB, preset=preset)
    config = SamplerConfig(num_steps=5, order=order, truncation=0.9)  # type: ignore[arg-type]
    denoiser = Denoiser(TINY).eval().requires_grad_(False).to(device)
    y = torch.zeros(2, 3, TINY.condition_dim, device=device)
    both = denoiser.prepare(with_null(make_condition(y[:, 0], y[:, 1:])))
    watched = Watched()

    def denoise(x_n: Tensor, step: Tensor, condition: Any) -> Tensor:
        watched.begun = True
        return denoiser(x_n, step, condition)

    with watched:
        sampling.sample(
            denoise, schedule, None, both, config=config, grid=GRID, generators=generators(), device=device, **start
        )
    return watched


@every_chain
def test_nothing_is_read_from_the_device_or_brought_to_it_during_a_chain(
    preset: Preset, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is `meta`: its tensors have no values, so that any read is an error; the last one is taken away."""
    monkeypatch.setattr(sampling, "_check_finite", lambda finite: None)
    watched = chain(preset, order, "meta")
    assert len(watched.operations) > 100
    assert [name for name, devices in watched.operations if "cpu" in devices] == []


@every_chain
def test_a_chain_of_an_edit_reads_one_number_at_its_end(preset: Preset, order: str) -> None:
    schedule = Schedule(num_steps=STEPS, vocab_size=VOCAB, preset=preset)
    image = torch.randint(VOCAB, (2, GRID**2), generator=generator_for("image"))
    x_start = q_sample(schedule, image, torch.tensor([15, 15]), generators())
    operations = [name for name, _ in chain(preset, order, "cpu", x_start=x_start, start_step=15).operations]
    assert [name for name in operations if name in READS] == ["_local_scalar_dense"]
    assert operations[-1] == "_local_scalar_dense"


@every_chain
def test_places_that_need_not_be_computed_change_nothing(preset: Preset, order: str) -> None:
    schedule = Schedule(num_steps=STEPS, vocab_size=VOCAB, preset=preset)
    config = SamplerConfig(num_steps=5, order=order)  # type: ignore[arg-type]
    moves = plan(schedule, config, grid=GRID, start_step=STEPS)
    logits = torch.randn(4, GRID**2, VOCAB, generator=generator_for("logits"))
    way = Way(denoise=lambda x_n, step, y: logits, schedule=schedule, order=config.order, truncation=1.0)
    masked = torch.full((2,), GRID**2)
    ahead = passes(schedule, config, moves, masked, grid=GRID, generators=generators(), device="cpu")
    if order != "ancestral" and not schedule.replaces:
        assert [now.places for now in ahead] != [GRID**2] * len(ahead)
    x_n = torch.full((2, GRID**2), VOCAB)
    for now in ahead:
        x_s = reverse_step(way, now, x_n, None)[0]
        assert torch.equal(x_s, reverse_step(way, replace(now, places=GRID**2), x_n, None)[0])
        x_n = x_s
    assert (x_n < VOCAB).all()


@every_chain
def test_tokens_stay_in_range_when_predictions_are_not_numbers(preset: Preset, order: str) -> None:
    """The denoiser goes on to look tokens up in a table until the chain has ended and the error can be said."""
    schedule = Schedule(num_steps=STEPS, vocab_size=VOCAB, preset=preset)
    config = SamplerConfig(num_steps=5, order=order, guidance_scale=1.0)  # type: ignore[arg-type]
    moves = plan(schedule, config, grid=GRID, start_step=STEPS)
    logits = torch.full((2, GRID**2, VOCAB), torch.nan)
    way = Way(denoise=lambda x_n, step, y: logits, schedule=schedule, order=config.order, truncation=0.9)
    x_n = torch.full((2, GRID**2), VOCAB)
    masked = torch.full((2,), GRID**2)
    for now in passes(schedule, config, moves, masked, grid=GRID, generators=generators(), device="cpu"):
        x_n, _, finite = reverse_step(way, now, x_n, None)
        assert not finite
        assert x_n.min() >= 0
        assert x_n.max() <= VOCAB
