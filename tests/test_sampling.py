"""Algorithm 2: what a chain visits, where guidance acts, and that few steps draw from the same distribution."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from knn_diffusion.config import from_dict
from knn_diffusion.diffusion.plan import SamplerConfig, guidance_at, halton_rank, plan, stride_steps
from knn_diffusion.diffusion.process import Preset, Schedule, posterior, q_sample
from knn_diffusion.diffusion.sampling import StepInfo, sample
from knn_diffusion.diffusion.step import guide, truncate
from knn_diffusion.errors import CheckpointError, ConfigError, UsageError

PRESETS = ("released", "mask-and-replace", "absorbing")
ORDERS = ("ancestral", "halton", "confidence")
GRID, VOCAB = 4, 6
SCHEDULE = Schedule(num_steps=20, vocab_size=VOCAB)
every_chain = pytest.mark.parametrize(("preset", "order"), list(itertools.product(PRESETS, ORDERS)))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [seeded(first + index) for index in range(count)]


def config(**changes: Any) -> SamplerConfig:
    """Unguided sampling unless said otherwise."""
    return SamplerConfig(**{"num_steps": 8, "guidance_scale": 1.0, **changes})


def always(logits: Tensor) -> Callable[[Tensor, Tensor, Any], Tensor]:
    """A denoiser that predicts the same whatever it sees; `logits` are seq vocab."""
    return lambda x_n, step, condition: logits.expand(len(x_n), -1, -1)


def contextual(x_n: Tensor, step: Tensor, condition: Any) -> Tensor:
    """A denoiser whose prediction depends on its tokens, its step and its condition (a row of numbers per image)."""
    place = torch.arange(x_n.shape[1])[:, None] * 1.7 + torch.arange(VOCAB)
    state = (x_n + 1).float().cumsum(1).unsqueeze(-1) * 0.37 + step[:, None, None] * 0.11 + condition[:, None, None]
    return 3 * torch.sin(place + state)


def draw(
    denoise: Callable[[Tensor, Tensor, Any], Tensor],
    schedule: Schedule,
    sampler: SamplerConfig,
    count: int = 1,
    **more: Any,
) -> Tensor:
    return sample(denoise, schedule, None, None, config=sampler, grid=GRID, generators=generators(count), **more)


def watched(schedule: Schedule, sampler: SamplerConfig, count: int = 3, **more: Any) -> list[StepInfo]:
    """Everything the callback is told while a chain runs."""
    seen: list[StepInfo] = []
    draw(
        always(torch.randn(GRID**2, VOCAB, generator=seeded(7))), schedule, sampler, count, callback=seen.append, **more
    )
    return seen


@every_chain
def test_a_denoiser_that_knows_the_image_draws_it(preset: Preset, order: str) -> None:
    image = torch.randint(VOCAB, (GRID**2,), generator=seeded(5))
    logits = torch.nn.functional.one_hot(image, VOCAB) * 50.0
    drawn = draw(always(logits), Schedule(num_steps=20, vocab_size=VOCAB, preset=preset), config(order=order), 3)
    assert torch.equal(drawn, image.expand(3, -1))


@every_chain
@pytest.mark.parametrize("num_steps", [1, 4])
def test_any_number_of_steps_draws_from_the_predicted_distribution(preset: Preset, order: str, num_steps: int) -> None:
    """A constant prediction must come out as it is, however few the steps (the choice by confidence drowned in noise)."""
    schedule = Schedule(num_steps=20, vocab_size=4, preset=preset)
    probs = torch.tensor([0.55, 0.3, 0.1, 0.05])
    sampler = config(order=order, num_steps=num_steps, choice_temperature=1e9)
    drawn = sample(
        always(probs.log().expand(24**2, -1)), schedule, None, None, config=sampler, grid=24, generators=generators(10)
    )
    shares = torch.bincount(drawn.flatten(), minlength=4) / drawn.numel()
    assert torch.allclose(shares, probs, atol=0.025)


@pytest.mark.parametrize(("order", "likeliest"), [("ancestral", 0.55), ("halton", 0.55), ("confidence", 0.75)])
def test_confidence_alone_favours_likely_codes(order: str, likeliest: float) -> None:
    """As its docstring says: the draws that are kept are chosen by what was drawn."""
    schedule = Schedule(num_steps=20, vocab_size=4, preset="absorbing")
    logits = torch.tensor([0.55, 0.3, 0.1, 0.05]).log().expand(24**2, -1)
    sampler = config(order=order, num_steps=16, choice_temperature=0.5)
    drawn = sample(always(logits), schedule, None, None, config=sampler, grid=24, generators=generators(10))
    share = float((drawn == 0).float().mean())
    assert share > likeliest if order == "confidence" else share == pytest.approx(likeliest, abs=0.025)


@every_chain
def test_no_mask_is_left_and_no_unmasked_token_is_masked_again(preset: Preset, order: str) -> None:
    schedule = Schedule(num_steps=20, vocab_size=VOCAB, preset=preset)
    visible = torch.zeros(3, GRID**2, dtype=torch.bool)
    for info in watched(schedule, config(order=order)):
        now = info.x_n != schedule.mask_id
        assert (now | ~visible).all()
        assert (info.x_0 < VOCAB).all()
        assert torch.equal(info.x_0[now], info.x_n[now])
        visible = now
    assert visible.all()


@pytest.mark.parametrize("order", ["halton", "confidence"])
@pytest.mark.parametrize("preset", ["released", "absorbing"])
def test_chosen_orders_keep_what_they_drew_where_the_schedule_only_masks(preset: Preset, order: str) -> None:
    schedule = Schedule(num_steps=20, vocab_size=VOCAB, preset=preset)
    for earlier, later in itertools.pairwise(watched(schedule, config(order=order))):
        held = earlier.x_n != schedule.mask_id
        assert torch.equal(earlier.x_n[held], later.x_n[held])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("passes", [4, 25])
def test_strided_chains_show_the_denoiser_the_masked_share_of_its_step(preset: Preset, passes: int) -> None:
    """The reference code's stride leaves 24.5 % masked before the last of 25 passes over 100 steps; it must be 4 %."""
    schedule = Schedule(num_steps=100, vocab_size=VOCAB, preset=preset)
    shares: list[tuple[int, float]] = []

    def denoise(x_n: Tensor, step: Tensor, condition: Any) -> Tensor:
        shares.append((int(step[0]), float((x_n == VOCAB).float().mean())))
        return torch.zeros(*x_n.shape, VOCAB)

    sampler = config(order="ancestral", num_steps=passes)
    sample(denoise, schedule, None, None, config=sampler, grid=48, generators=generators(1))
    assert len(shares) == passes
    assert shares[-1][0] == 100 / passes
    for step, share in shares:
        assert share == pytest.approx(float(schedule.gamma_bar[step]), abs=0.035)


@pytest.mark.parametrize("order", ["halton", "confidence"])
@pytest.mark.parametrize("reveal", ["schedule", "cosine", "arccos"])
@pytest.mark.parametrize("preset", PRESETS)
def test_chosen_orders_show_the_denoiser_the_step_of_its_masked_share(preset: Preset, reveal: str, order: str) -> None:
    schedule = Schedule(num_steps=100, vocab_size=VOCAB, preset=preset)
    seen: list[tuple[int, Tensor]] = []

    def denoise(x_n: Tensor, step: Tensor, condition: Any) -> Tensor:
        seen.append((int(step[0]), (x_n == VOCAB).sum(1)))
        return torch.zeros(*x_n.shape, VOCAB)

    sampler = config(order=order, reveal=reveal, num_steps=7)
    sample(denoise, schedule, None, None, config=sampler, grid=16, generators=generators(2))
    assert len(seen) == 7
    moves = plan(schedule, sampler, grid=16, start_step=100)
    masked_at_start = seen[0][1]
    for (step, masked), move, next_masked in zip(seen, moves, [*(m for _, m in seen[1:]), torch.zeros(2)], strict=True):
        assert step == move.step
        assert torch.allclose(masked / 256, schedule.gamma_bar[step].float(), atol=0.05)
        assert torch.equal(next_masked.long(), (masked_at_start.double() * move.share).round().long())


@given(start=st.integers(0, 200), passes=st.integers(1, 250))
@settings(max_examples=40, deadline=None)
def test_visited_steps_fall_strictly_to_zero_in_nearly_equal_strides(start: int, passes: int) -> None:
    steps = stride_steps(start, passes)
    assert steps[0] == start
    assert steps[-1] == 0
    assert len(steps) == min(start, passes) + 1
    strides = {earlier - later for earlier, later in itertools.pairwise(steps)}
    assert all(stride >= 1 for stride in strides)
    assert not strides or max(strides) - min(strides) <= 2


@given(
    order=st.sampled_from(ORDERS),
    reveal=st.sampled_from(["schedule", "cosine", "arccos"]),
    preset=st.sampled_from(PRESETS),
    passes=st.integers(1, 40),
    start=st.integers(1, 40),
    grid=st.integers(1, 8),
)
@settings(max_examples=50, deadline=None)
def test_every_plan_ends_at_the_image_and_never_climbs(
    *, order: str, reveal: str, preset: Preset, passes: int, start: int, grid: int
) -> None:
    schedule = Schedule(num_steps=40, vocab_size=VOCAB, preset=preset)
    moves = plan(schedule, config(order=order, reveal=reveal, num_steps=passes), grid=grid, start_step=start)
    assert 1 <= len(moves) <= passes
    assert moves[0].step == start
    assert (moves[-1].prev_step, moves[-1].share) == (0, 0)
    assert all(move.prev_step < move.step for move in moves)
    assert all(later.step <= earlier.step for earlier, later in itertools.pairwise(moves))
    assert all(later.share < earlier.share for earlier, later in itertools.pairwise(moves))


def test_passes_that_would_unmask_nothing_are_left_out() -> None:
    schedule = Schedule(num_steps=100, vocab_size=VOCAB, preset="absorbing")
    assert len(plan(schedule, config(order="halton", num_steps=100), grid=2, start_step=100)) == 4


@every_chain
def test_an_image_depends_on_its_own_generator_alone(preset: Preset, order: str) -> None:
    schedule = Schedule(num_steps=20, vocab_size=VOCAB, preset=preset)
    sampler = config(order=order, guidance_scale=2.0)

    def images(first: int, count: int) -> Tensor:
        zero = torch.zeros(count)
        return sample(
            contextual, schedule, zero + 1, torch.cat([zero + 1, zero]),
            config=sampler, grid=GRID, generators=generators(count, first),
        )  # fmt: skip

    together = images(0, 4)
    assert torch.equal(together, torch.cat([images(index, 1) for index in range(4)]))
    assert torch.equal(together, images(0, 4))
    assert not torch.equal(together[0], together[1])


def test_halton_visits_every_cell_once_and_the_first_cells_lie_far_apart() -> None:
    for grid in (1, 4, 7, 16):
        assert sorted(halton_rank(grid).tolist()) == list(range(grid**2))
    first = (halton_rank(16) < 32).reshape(2, 8, 2, 8).sum(dim=(1, 3))
    assert first.min() >= 7
    assert first.max() <= 9


def test_the_halton_order_unmasks_the_cells_it_visits_first() -> None:
    first = watched(SCHEDULE, config(order="halton"))[0].x_n != VOCAB
    assert torch.equal(first, (halton_rank(GRID) < first[0].sum()).expand(3, -1))


def test_confidence_without_noise_takes_the_surest_tokens_first() -> None:
    sharpness = torch.randperm(GRID**2, generator=seeded()) + 1.0
    logits = torch.zeros(GRID**2, VOCAB)
    logits[:, 2] = 20 * sharpness
    schedule = Schedule(num_steps=16, vocab_size=VOCAB, preset="absorbing")
    seen: list[StepInfo] = []
    sampler = config(order="confidence", num_steps=4, choice_temperature=0.0, temperature=40.0)
    draw(always(logits), schedule, sampler, callback=seen.append)
    visible = seen[0].x_n[0] != VOCAB
    drawn_sure = (logits / 40).softmax(-1)[:, 2] > 0.9
    assert visible.any()
    assert (drawn_sure | ~visible).all()


def recorded(schedule: Schedule, sampler: SamplerConfig) -> tuple[Tensor, list[tuple[int, int]]]:
    """Tokens of two guided images, and for each pass its step and how many rows the denoiser saw."""
    passes: list[tuple[int, int]] = []

    def denoise(x_n: Tensor, step: Tensor, condition: Tensor) -> Tensor:
        assert len(condition) == len(x_n) == len(step)
        passes.append((int(step[0]), len(x_n)))
        return contextual(x_n, step, condition)

    given, null = torch.tensor([1.0, 2.0]), torch.zeros(2)
    both = torch.cat([given, null])
    return sample(denoise, schedule, given, both, config=sampler, grid=GRID, generators=generators(2)), passes


def test_guidance_of_one_is_the_conditional_model_at_half_the_cost() -> None:
    guided, passes = recorded(SCHEDULE, config(guidance_scale=1.0))
    assert {rows for _, rows in passes} == {2}
    conditional = sample(
        contextual, SCHEDULE, torch.tensor([1.0, 2.0]), None, config=config(), grid=GRID, generators=generators(2)
    )
    assert torch.equal(guided, conditional)
    logits = [torch.randn(1, 4, 5, generator=seeded(index)) for index in range(2)]
    assert torch.allclose(guide(logits[0], logits[1], 1.0), logits[0], atol=1e-6)


def test_guidance_of_zero_is_the_unconditional_model() -> None:
    guided, passes = recorded(SCHEDULE, config(guidance_scale=0.0))
    assert {rows for _, rows in passes} == {4}
    unconditional = sample(
        contextual, SCHEDULE, torch.zeros(2), None, config=config(), grid=GRID, generators=generators(2)
    )
    assert torch.equal(guided, unconditional)


def test_adding_a_constant_to_the_logits_of_a_position_changes_nothing() -> None:
    def shifted(x_n: Tensor, step: Tensor, condition: Tensor) -> Tensor:
        shift = torch.arange(x_n.shape[1]) * 0.25 + condition[:, None]
        return contextual(x_n, step, condition).double() + shift.unsqueeze(-1)

    both = torch.tensor([1.0, 2.0, 0.0, 0.0])
    chains = [
        sample(
            denoise, SCHEDULE, both[:2], both, config=config(guidance_scale=8.0), grid=GRID, generators=generators(2)
        )
        for denoise in (contextual, shifted)
    ]
    assert torch.equal(*chains)


@given(seed=st.integers(0, 500), scale=st.floats(0, 20))
@settings(max_examples=30, deadline=None)
def test_guidance_on_x_0_never_changes_the_pace_of_unmasking(seed: int, scale: float) -> None:
    """Guiding the posterior instead would: there λ = 8 leaves next to nothing masked."""
    schedule = Schedule(num_steps=20, vocab_size=VOCAB)
    conditional, null = (4 * torch.randn(1, 5, VOCAB, generator=seeded(2 * seed + half)) for half in (0, 1))
    masked, n, s = torch.full((1, 5), VOCAB), torch.tensor([12]), torch.tensor([8])
    stays = posterior(schedule, guide(conditional, null, scale), masked, schedule.stride(n, s))[..., -1]
    assert torch.allclose(stays, schedule.gamma_bar[8] / schedule.gamma_bar[12], atol=1e-12)
    halves = (posterior(schedule, logits, masked, schedule.stride(n, s)).log() for logits in (conditional, null))
    on_posterior = guide(*halves, scale)
    if scale > 8:
        assert (on_posterior.softmax(-1)[..., -1] < stays - 0.05).any()


def test_guidance_schedules_run_from_one_to_lambda() -> None:
    for schedule in ("linear", "power-cosine"):
        made = config(guidance_scale=8.0, guidance_schedule=schedule)
        values = [guidance_at(made, progress / 10) for progress in range(11)]
        assert values[0] == 1
        assert values[-1] == pytest.approx(8)
        assert values == sorted(values)
    late = config(guidance_scale=8.0, guidance_schedule="power-cosine")
    assert guidance_at(late, 1 / 3) < 1.1
    assert guidance_at(config(guidance_scale=8.0, guidance_schedule="linear"), 0.5) == 4.5
    assert {guidance_at(SamplerConfig.paper(), progress / 10) for progress in range(10)} == {8.0}


@pytest.mark.parametrize("order", ORDERS)
def test_outside_the_interval_only_the_conditional_half_is_computed(order: str) -> None:
    made = config(order=order, guidance_scale=5.0, guidance_schedule="interval", guidance_interval=(0.3, 0.7))
    _, passes = recorded(SCHEDULE, made)
    assert passes == [(step, 4 if 0.3 <= 1 - step / 20 <= 0.7 else 2) for step, _ in passes]
    assert {rows for _, rows in passes} == {2, 4}


def test_guidance_without_the_null_condition_is_refused() -> None:
    with pytest.raises(
        UsageError, match="guidance of 8 needs the null condition, got none: pass both, or guidance_scale=1"
    ):
        draw(always(torch.zeros(GRID**2, VOCAB)), SCHEDULE, config(guidance_scale=8.0))


def test_truncation_keeps_the_fewest_codes_that_hold_the_mass() -> None:
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log().expand(1, 1, -1)
    for mass, kept in ((0.45, [1]), (0.55, [1, 2]), (0.8, [1, 2, 3]), (1.0, [0, 1, 2, 3]), (1e-6, [1])):
        got = truncate(logits, mass)
        assert got[0, 0].isfinite().nonzero().flatten().tolist() == kept
        assert torch.equal(got[0, 0, kept], logits[0, 0, kept])


@pytest.mark.parametrize("order", ORDERS)
def test_truncated_codes_are_never_drawn_where_tokens_are_only_masked(order: str) -> None:
    logits = torch.tensor([0.1, 0.5, 0.25, 0.15]).log().expand(GRID**2, -1)
    schedule = Schedule(num_steps=10, vocab_size=4, preset="absorbing")
    drawn = draw(always(logits), schedule, config(order=order, truncation=0.7), 40)
    assert set(drawn.unique().tolist()) == {1, 2}


@pytest.mark.parametrize("order", ORDERS)
def test_a_low_temperature_takes_the_likeliest_code(order: str) -> None:
    logits = torch.randn(GRID**2, VOCAB, generator=seeded(3))
    drawn = draw(always(logits), SCHEDULE, config(order=order, temperature=1e-4), 2)
    assert torch.equal(drawn, logits.argmax(-1).expand(2, -1))


@every_chain
def test_an_edit_starts_from_the_reference_and_step_zero_returns_it(preset: Preset, order: str) -> None:
    schedule = Schedule(num_steps=20, vocab_size=VOCAB, preset=preset)
    image = torch.randint(VOCAB, (2, GRID**2), generator=seeded(5))
    logits = always(torch.zeros(GRID**2, VOCAB))
    assert torch.equal(draw(logits, schedule, config(order=order), 2, x_start=image, start_step=0), image)
    x_start = q_sample(schedule, image, torch.tensor([6, 6]), generators(2))
    seen: list[StepInfo] = []
    sampler = config(order=order, num_steps=3)
    edited = draw(logits, schedule, sampler, 2, x_start=x_start, start_step=6, callback=seen.append)
    assert [info.index for info in seen] == list(range(1, seen[0].total + 1))
    assert seen[-1].step == 0
    assert (edited < VOCAB).all()
    if order != "ancestral" and not schedule.replaces:
        held = x_start != VOCAB
        assert torch.equal(edited[held], x_start[held])


def test_a_start_that_does_not_fit_is_refused() -> None:
    logits = always(torch.zeros(GRID**2, VOCAB))
    image = torch.zeros(1, GRID**2, dtype=torch.long)
    with pytest.raises(UsageError, match=r"expected x_start and start_step together, got one of them"):
        draw(logits, SCHEDULE, config(), x_start=image)
    with pytest.raises(UsageError, match=r"expected x_start of shape \(1, 16\), got \(1, 9\)"):
        draw(logits, SCHEDULE, config(), x_start=image[:, :9], start_step=3)
    with pytest.raises(UsageError, match=r"expected start_step from 0 to 20, got 21"):
        draw(logits, SCHEDULE, config(), x_start=image, start_step=21)
    with pytest.raises(UsageError, match=r"expected at most 20 steps, as trained, got 21: ask for fewer steps"):
        draw(logits, SCHEDULE, config(num_steps=21))


def test_the_callback_sees_every_pass_and_may_end_the_chain() -> None:
    infos = watched(SCHEDULE, config(order="ancestral", num_steps=5))
    assert [(info.index, info.total, info.step) for info in infos] == [(i + 1, 5, 16 - 4 * i) for i in range(5)]

    class CancelledError(Exception):
        pass

    def cancel(info: StepInfo) -> None:
        if info.index == 2:
            raise CancelledError

    with pytest.raises(CancelledError):
        draw(always(torch.zeros(GRID**2, VOCAB)), SCHEDULE, config(), callback=cancel)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_denoiser_that_returns_no_numbers_is_named(order: str, value: float) -> None:
    logits = torch.zeros(GRID**2, VOCAB)
    logits[5, 2] = value
    with pytest.raises(CheckpointError, match="expected finite logits from the denoiser, got NaN or infinity"):
        draw(always(logits), SCHEDULE, config(order=order))


def test_a_preview_of_predictions_that_are_no_numbers_is_refused() -> None:
    with pytest.raises(CheckpointError, match="expected finite logits from the denoiser, got NaN or infinity"):
        draw(always(torch.full((GRID**2, VOCAB), torch.nan)), SCHEDULE, config(), callback=lambda info: info.x_0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps must be at least 1, got 0: change num_steps"),
        ({"guidance_scale": -1.0}, "guidance_scale must be at least 0 and finite, got -1.0"),
        ({"guidance_interval": (0.7, 0.3)}, "guidance_interval must be two shares of the way"),
        ({"truncation": 0.0}, "truncation must be above 0 and at most 1, got 0.0"),
        ({"temperature": 0.0}, "temperature must be above 0 and finite, got 0.0"),
        ({"choice_temperature": -0.5}, "choice_temperature must be at least 0 and finite, got -0.5"),
    ],
)
def test_impossible_samplers_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SamplerConfig(**changes)


def test_a_sampler_is_read_from_plain_values() -> None:
    made = from_dict(SamplerConfig, {"guidance_schedule": "interval", "guidance_interval": [0.1, 0.9]})
    assert made.guidance_interval == (0.1, 0.9)
    with pytest.raises(ConfigError, match="order: input should be 'ancestral', 'halton' or 'confidence'"):
        from_dict(SamplerConfig, {"order": "random"})
