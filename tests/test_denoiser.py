from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from knn_diffusion.errors import ConfigError, FingerprintError, UsageError
from knn_diffusion.models.denoiser import PAPER, Denoiser, DenoiserConfig, PreparedCondition
from knn_diffusion.shapes import Condition

SMALL = DenoiserConfig(
    vocab_size=11, grid=4, width=32, depth=2, heads=4, condition_dim=12, num_steps=10, mlp_ratio=2, step_width=16
)


def make(seed: int = 0, **changes: object) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(replace(SMALL, **changes))  # type: ignore[arg-type]


def random_condition(batch: int = 3, slots: int = 4) -> Condition:
    y = functional.normalize(torch.randn(batch, slots, SMALL.condition_dim), dim=-1)
    return Condition(y=y, present=torch.ones(batch, slots, dtype=torch.bool))


def random_inputs(batch: int = 3) -> tuple[Tensor, Tensor]:
    x_n = torch.randint(0, SMALL.vocab_size + 1, (batch, SMALL.seq))
    return x_n, torch.randint(1, SMALL.num_steps + 1, (batch,))


def null(condition: Condition) -> Condition:
    return Condition(y=torch.zeros_like(condition.y), present=torch.ones_like(condition.present))


def dense_cross_attention(block: torch.nn.Module, h: Tensor, y: Tensor, present: Tensor) -> Tensor:
    """The textbook: project, split heads, mask, attend, join, project; in float64."""
    layer = block.cross_attention.double()
    q = layer.query(h.double()).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    k, v = (
        part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in layer.key_value(y.double()).chunk(2, dim=-1)
    )
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=present[:, None, None, :])
    return layer.output(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("bias", [False, True])
def test_folded_cross_attention_equals_the_textbook(bias: bool) -> None:
    block = make(cross_attention_bias=bias).blocks[0]
    if bias:
        for layer in (block.cross_attention.query, block.cross_attention.key_value, block.cross_attention.output):
            torch.nn.init.normal_(layer.bias)
    h, y = torch.randn(2, 16, SMALL.width), torch.randn(2, 5, SMALL.condition_dim)
    present = torch.tensor([[True] * 5, [True, False, True, True, False]])
    folded = block.cross_attention(h, *block.cross_attention.prepare(y, present))
    torch.testing.assert_close(folded.double(), dense_cross_attention(block, h, y, present), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("patch_size", [1, 2])
def test_null_condition_equals_the_network_without_cross_attention(
    patch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, (x_n, step) = make(patch_size=patch_size), random_inputs()
    with_null = denoiser(x_n, step, null(random_condition()))
    for block in denoiser.blocks:
        monkeypatch.setattr(block.cross_attention, "forward", lambda h, *_: torch.zeros_like(h))
    assert torch.equal(with_null, denoiser(x_n, step, random_condition()))


def test_condition_matters_and_so_does_the_step() -> None:
    denoiser, (x_n, step), condition = make(), random_inputs(), random_condition()
    out = denoiser(x_n, step, condition)
    assert not torch.allclose(out, denoiser(x_n, step, null(condition)), atol=1e-3)
    assert not torch.allclose(out, denoiser(x_n, SMALL.num_steps + 1 - step, condition), atol=1e-4)


def test_prepared_condition_equals_the_condition() -> None:
    denoiser, (x_n, step), condition = make(), random_inputs(), random_condition()
    assert torch.equal(denoiser(x_n, step, denoiser.prepare(condition)), denoiser(x_n, step, condition))


def test_absent_neighbors_equal_a_shorter_list() -> None:
    denoiser, (x_n, step), full = make(), random_inputs(), random_condition(slots=6)
    shorter = Condition(y=full.y[:, :4], present=full.present[:, :4])
    absent = Condition(y=full.y, present=full.present & (torch.arange(6) < 4))
    torch.testing.assert_close(denoiser(x_n, step, absent), denoiser(x_n, step, shorter))
    padded = Condition(y=full.y * (torch.arange(6) < 4)[None, :, None], present=full.present)
    assert not torch.allclose(denoiser(x_n, step, padded), denoiser(x_n, step, shorter), atol=1e-4)


def test_a_row_without_any_present_slot_equals_the_null() -> None:
    denoiser, (x_n, step), condition = make(), random_inputs(), random_condition()
    nothing = Condition(y=condition.y, present=torch.zeros_like(condition.present))
    assert torch.equal(denoiser(x_n, step, nothing), denoiser(x_n, step, null(condition)))
    denoiser(x_n, step, nothing).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in denoiser.parameters() if p.grad is not None)


def test_order_of_neighbors_does_not_matter_but_the_query_has_its_place() -> None:
    denoiser, (x_n, step), condition = make(), random_inputs(), random_condition()
    out = denoiser(x_n, step, condition)
    shuffled = replace(condition, y=condition.y[:, [0, 3, 1, 2]])
    torch.testing.assert_close(denoiser(x_n, step, shuffled), out)
    query_moved = replace(condition, y=condition.y[:, [1, 0, 2, 3]])
    assert not torch.allclose(denoiser(x_n, step, query_moved), out, atol=1e-3)


@pytest.mark.parametrize("slots", [1, 2])
def test_query_alone_and_one_neighbor_are_conditions_too(slots: int) -> None:
    denoiser, (x_n, step) = make(), random_inputs()
    assert denoiser(x_n, step, random_condition(slots=slots)).isfinite().all()


def test_both_halves_of_guidance_as_one_batch_equal_them_separately() -> None:
    denoiser, (x_n, step), condition = make(), random_inputs(), random_condition()
    halves = [denoiser.prepare(condition), denoiser.prepare(null(condition))]
    both = denoiser(torch.cat([x_n, x_n]), torch.cat([step, step]), PreparedCondition.cat(halves))
    apart = torch.cat([denoiser(x_n, step, half) for half in halves])
    torch.testing.assert_close(both, apart)


@pytest.mark.parametrize("rows", [slice(1, 3), [2, 0], torch.tensor([1, 1])])
def test_selected_rows_equal_the_condition_of_those_images(rows: slice | list[int] | Tensor) -> None:
    denoiser, (x_n, step), condition = make(), random_inputs(), random_condition()
    picked = denoiser.prepare(condition).select(rows)
    expected = denoiser(x_n, step, condition)[rows]
    torch.testing.assert_close(denoiser(x_n[rows], step[rows], picked), expected)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_every_patch_size_has_the_same_interface_and_learns_everywhere(patch_size: int) -> None:
    denoiser, (x_n, step) = make(patch_size=patch_size), random_inputs()
    logits = denoiser(x_n, step, random_condition())
    assert logits.shape == (3, SMALL.seq, SMALL.vocab_size)
    (logits * torch.randn_like(logits)).sum().backward()
    assert [name for name, p in denoiser.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_patches_are_squares_of_the_grid_going_in_and_out() -> None:
    denoiser = make(patch_size=2)
    denoiser.row_table.data.zero_()
    denoiser.column_table.data.zero_()
    x_n = torch.full((1, SMALL.seq), SMALL.mask_id)
    changed = x_n.clone()
    changed[0, 4 * 1 + 2] = 3  # row 1, column 2: the upper right square
    square = {2, 3, 6, 7}
    rows = (denoiser.embed(x_n) != denoiser.embed(changed)).any(dim=-1)[0]
    assert rows.tolist() == [False, True, False, False]
    per_place = torch.arange(4 * 4).reshape(1, 4, 4).repeat_interleave(SMALL.vocab_size, dim=-1).float()
    owner = denoiser.unmerge(per_place)[0, :, 0]
    assert {i for i in range(SMALL.seq) if owner[i] // 4 == 1} == square
    assert owner[[2, 3, 6, 7]].tolist() == [4, 5, 6, 7]


def test_bfloat16_weights_and_autocast_stay_close_to_float32() -> None:
    denoiser, (x_n, step), condition = make(), random_inputs(), random_condition()
    with torch.no_grad():
        exact = denoiser(x_n, step, condition)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = denoiser(x_n, step, condition)
            cast_prepared = denoiser(x_n, step, denoiser.prepare(condition))
        small = denoiser.to(torch.bfloat16)(x_n, step, condition)
    for logits in (cast, cast_prepared, small):
        assert logits.dtype == torch.float32
        assert (logits - exact).norm() / exact.norm() < 0.03


def test_null_condition_removes_cross_attention_in_bfloat16_too(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser, (x_n, step) = make().to(torch.bfloat16), random_inputs()
    with_null = denoiser(x_n, step, null(random_condition()))
    for block in denoiser.blocks:
        monkeypatch.setattr(block.cross_attention, "forward", lambda h, *_: torch.zeros_like(h))
    assert torch.equal(with_null, denoiser(x_n, step, random_condition()))


def test_gradients_flow_under_autocast() -> None:
    denoiser, (x_n, step) = make(), random_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = denoiser(x_n, step, random_condition())
    functional.cross_entropy(logits.flatten(0, 1), torch.randint(0, SMALL.vocab_size, (3 * SMALL.seq,))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in denoiser.parameters())


def test_first_prediction_is_nearly_uniform_and_signals_keep_their_size() -> None:
    denoiser, (x_n, step) = make(width=64, depth=6), random_inputs()
    log_probs = denoiser(x_n, step, random_condition()).log_softmax(dim=-1)
    assert (log_probs + torch.log(torch.tensor(float(SMALL.vocab_size)))).abs().max() < 0.6
    assert 0.8 < denoiser.embed(x_n).std() < 1.2


def test_paper_preset_has_the_parameters_its_docstring_says() -> None:
    with torch.device("meta"):
        assert Denoiser(PAPER).parameter_count == 487_126_855


def test_impossible_configurations_are_refused_with_field_value_and_rule() -> None:
    with pytest.raises(ConfigError, match="heads must be a divisor of width 32, got 5: change heads"):
        replace(SMALL, heads=5)
    with pytest.raises(ConfigError, match="patch_size must be a divisor of grid 4, got 3"):
        replace(SMALL, patch_size=3)
    with pytest.raises(ConfigError, match="step_width must be even and at least 2, got 7"):
        replace(SMALL, step_width=7)
    for field in ("vocab_size", "grid", "width", "depth", "heads", "condition_dim", "num_steps", "mlp_ratio"):
        with pytest.raises(ConfigError, match=f"{field} must be at least 1, got 0: change {field}"):
            replace(SMALL, **{field: 0})


def test_wrong_widths_and_lengths_are_refused() -> None:
    denoiser, (x_n, step), condition = make(), random_inputs(), random_condition()
    with pytest.raises(FingerprintError, match="reads 12-d embeddings, the condition has 9-d ones: use the encoder"):
        denoiser(x_n, step, replace(condition, y=condition.y[..., :9]))
    with pytest.raises(UsageError, match="works on 4 × 4 tokens, got 15 in a row: use the tokenizer"):
        denoiser(x_n[:, :15], step, condition)
