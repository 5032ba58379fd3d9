from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from knn_diffusion.diffusion.conditioning import make_condition, null_condition
from knn_diffusion.errors import ConfigError, FingerprintError, UsageError
from knn_diffusion.models.copying import COMPARED
from knn_diffusion.models.cross_attention import PreparedCondition
from knn_diffusion.models.denoiser import PAPER, Denoiser, DenoiserConfig, sigmoid_gelu
from knn_diffusion.shapes import Condition

SMALL = DenoiserConfig(
    vocab_size=11, grid=4, width=32, depth=2, heads=4, condition_dim=12, num_steps=10, mlp_ratio=2, step_width=16
)
GRIDS = {"patch_size": 2, "local_width": 8, "local_blocks": 2, "grid_neighbors": 3, "grid_layers": 2}
COPIES = GRIDS | {"copy_window": 3}
OPTIONS = pytest.mark.parametrize(
    "options", [{}, {"map_width": 16}, GRIDS, COPIES], ids=["plain", "maps", "grids", "copies"]
)


def make(seed: int = 0, **changes: object) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(replace(SMALL, **changes))  # type: ignore[arg-type]


def random_condition(batch: int = 3, slots: int = 4) -> Condition:
    y = functional.normalize(torch.randn(batch, slots, SMALL.condition_dim), dim=-1)
    grids = torch.randint(0, SMALL.vocab_size, (batch, 3, SMALL.seq))
    return make_condition(y[:, 0], y[:, 1:], grids=grids)


def random_inputs(batch: int = 3) -> tuple[Tensor, Tensor]:
    x_n = torch.randint(0, SMALL.vocab_size + 1, (batch, SMALL.seq))
    return x_n, torch.randint(1, SMALL.num_steps + 1, (batch,))


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


def test_what_a_place_reads_from_the_maps_equals_the_textbook() -> None:
    denoiser = make(map_width=32, patch_size=2).double()
    layer, maps_of = denoiser.map_attention["0"], denoiser.slot_maps
    h, y = torch.randn(2, 4, SMALL.width).double(), torch.randn(2, 5, SMALL.condition_dim).double()
    present = torch.tensor([[True] * 5, [True, False, True, True, False]])
    read = layer(h, maps_of(y, present))
    for row in range(2):
        for place in range(4):
            cells = maps_of.lay_out(y[row]).unflatten(-1, (4, 40))[present[row], place]  # slots (8 keys, 32 values)
            query = layer.query(functional.layer_norm(h[row, place], (SMALL.width,)))
            parts = []
            for head in range(4):
                keys, values = cells[:, :8][:, 2 * head : 2 * head + 2], cells[:, 8:][:, 8 * head : 8 * head + 8]
                weights = (keys @ query[2 * head : 2 * head + 2] / 2**0.5).softmax(0)
                parts.append(weights @ values)
            torch.testing.assert_close(read[row, place], layer.output(torch.cat(parts)))


@pytest.mark.parametrize("options", [{}, {"patch_size": 2}, {"map_width": 16}, GRIDS, COPIES], ids=str)
def test_null_condition_equals_the_network_without_what_reads_y(
    options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser, (x_n, step) = make(**options), random_inputs()
    with_null = denoiser(x_n, step, null_condition(random_condition()))
    for block in denoiser.blocks:
        monkeypatch.setattr(block.cross_attention, "forward", lambda h, *_: torch.zeros_like(h))
    for layer in denoiser.map_attention.values():
        monkeypatch.setattr(layer, "forward", lambda h, _: torch.zeros_like(h))
    for layer in denoiser.grid_attention.values():
        monkeypatch.setattr(layer, "forward", lambda h, _: torch.zeros_like(h))
    if denoiser.local is not None:
        monkeypatch.setattr(denoiser.local.leader, "forward", torch.zeros_like)
    if denoiser.copy_head is not None:
        monkeypatch.setattr(denoiser.copy_head, "forward", lambda logits, *_: logits)
    assert torch.equal(with_null, denoiser(x_n, step, random_condition()))


def test_what_a_place_reads_of_the_grids_equals_the_textbook() -> None:
    denoiser, condition = make(**GRIDS).double(), random_condition(batch=1)
    layer, reader = denoiser.grid_attention["1"], denoiser.grid_reader
    torch.nn.init.normal_(layer.nearness)
    h, heads, channels = torch.randn(1, 4, SMALL.width).double(), 4, SMALL.width // 4
    read = layer(h, denoiser.prepare(replace(condition, grids_present=torch.tensor([[True, False, True]]))).grids)
    query = layer.query(functional.layer_norm(h, (SMALL.width,)))
    cells = []
    for rank in (0, 2):
        for place in range(4):
            merged = denoiser._merged(denoiser._features(condition.grids[:, rank]))[0, place]
            where = reader.row_table[place // 2, 0] + reader.column_table[place % 2] + reader.rank_table[rank, 0]
            cells.append((place, *reader.key_value(reader.norm(merged + where)).chunk(2)))
    for place in range(4):
        parts = []
        for head in range(heads):
            some = slice(head * channels, (head + 1) * channels)
            scores = []
            for cell, key, _ in cells:
                down, right = place // 2 - cell // 2, place % 2 - cell % 2
                near = layer.nearness[head, (down + 1) * 3 + right + 1]
                scores.append(query[0, place, some] @ key[some] / channels**0.5 + near)
            weights = torch.stack(scores).softmax(0)
            parts.append(sum(weight * value[some] for weight, (_, _, value) in zip(weights, cells, strict=True)))
        torch.testing.assert_close(read[0, place], layer.output(torch.cat(parts)))


def test_what_is_added_for_codes_near_a_token_equals_a_loop_over_the_grids() -> None:
    denoiser, condition = make(**COPIES).double(), random_condition(batch=1)
    torch.nn.init.normal_(denoiser.copy_head.say.weight)
    condition = replace(condition, grids_present=torch.tensor([[True, False, True]]))
    layer, offers = denoiser.copy_head, denoiser.prepare(condition).offers
    logits, h = torch.randn(1, 16, SMALL.vocab_size).double(), torch.randn(1, 16, 8).double()
    expected = logits.clone()
    for token in range(16):
        for rank in (0, 2):
            features = denoiser._features(condition.grids[:, rank])[0]
            for down in range(3):
                for right in range(3):
                    i, j = token // 4 + down - 1, token % 4 + right - 1
                    if not (0 <= i < 4 and 0 <= j < 4):
                        continue
                    key = layer.key(functional.layer_norm(features[4 * i + j], (8,)))
                    score = layer.query(h[0, token]) @ key / COMPARED**0.5
                    score = score + layer.say(h[0, token])[9 * rank + 3 * down + right]
                    expected[0, token, condition.grids[0, rank, 4 * i + j]] += score
    torch.testing.assert_close(layer(logits, h, offers), expected)


@OPTIONS
def test_tokens_asked_for_are_predicted_as_among_all(options: dict[str, int]) -> None:
    denoiser, (x_n, step), condition = make(**options), random_inputs(), random_condition()
    asked = torch.rand(x_n.shape) < 0.4
    some = denoiser(x_n, step, condition, asked)
    torch.testing.assert_close(some, denoiser(x_n, step, condition)[asked])


@pytest.mark.parametrize("options", [GRIDS, COPIES], ids=["grids", "copies"])
def test_a_condition_without_grids_equals_one_whose_grids_are_absent_whatever_these_show(
    options: dict[str, int],
) -> None:
    denoiser, (x_n, step), condition = make(**options), random_inputs(), random_condition()
    absent = replace(condition, grids_present=torch.zeros(3, 3, dtype=torch.bool))
    without = denoiser(x_n, step, replace(condition, grids=None, grids_present=None))
    assert torch.equal(denoiser(x_n, step, absent), without)
    assert not torch.allclose(denoiser(x_n, step, condition), without, atol=1e-3)
    fewer = replace(condition, grids=condition.grids[:, :2], grids_present=condition.grids_present[:, :2])
    partly = replace(condition, grids_present=torch.tensor([[True, True, False]]).expand(3, 3))
    assert torch.equal(denoiser(x_n, step, partly), denoiser(x_n, step, fewer))


def test_the_first_grid_that_is_there_leads() -> None:
    denoiser, condition = make(**GRIDS), random_condition()
    present = torch.tensor([[True, True, True], [False, True, True], [False, False, False]])
    leader = denoiser.prepare(replace(condition, grids_present=present)).grids.leader
    torch.testing.assert_close(leader[0], denoiser._features(condition.grids[:1, 0])[0])
    torch.testing.assert_close(leader[1], denoiser._features(condition.grids[1:2, 1])[0])
    assert not leader[2].any()


def test_a_place_sees_all_places_of_a_grid_and_neighbors_of_its_tokens() -> None:
    denoiser, (x_n, step), condition = make(**GRIDS), random_inputs(1), random_condition(1)
    out = denoiser(x_n, step, condition)
    other = condition.grids.clone()
    other[0, 2, 15] = (other[0, 2, 15] + 1) % SMALL.vocab_size  # the last token of the last grid
    seen = denoiser(x_n, step, replace(condition, grids=other))
    assert (seen != out).flatten(2).any(-1).all()


def test_copying_what_a_shifted_grid_shows_is_learned_quickly() -> None:
    config = replace(SMALL, vocab_size=16, grid=8, width=64, **GRIDS | {"local_width": 32})
    losses = {}
    for shown in (True, False):
        torch.manual_seed(0)
        denoiser = Denoiser(config)
        optimizer = torch.optim.AdamW(denoiser.parameters(), lr=4e-3, betas=(0.9, 0.96))
        for _ in range(60):
            image = torch.randint(0, 16, (16, 8, 8))
            grids = torch.stack([image.roll((0, 1), (1, 2)), torch.randint(0, 16, (16, 8, 8))], dim=1).flatten(2)
            present = torch.full((16, 2), shown)
            y = Condition(y=torch.zeros(16, 1, 12), present=present[:, :1] | True, grids=grids, grids_present=present)
            masked = torch.full((16, 64), config.mask_id)
            logits = denoiser(masked, torch.full((16,), config.num_steps), y)
            loss = functional.cross_entropy(logits.flatten(0, 1), image.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[shown] = loss.item()
    assert losses[False] > 2.7  # nothing to know: ln 16 is 2.77
    assert losses[True] < 1.0


def test_condition_matters_and_so_does_the_step() -> None:
    denoiser, (x_n, step), condition = make(), random_inputs(), random_condition()
    out = denoiser(x_n, step, condition)
    assert not torch.allclose(out, denoiser(x_n, step, null_condition(condition)), atol=1e-3)
    assert not torch.allclose(out, denoiser(x_n, SMALL.num_steps + 1 - step, condition), atol=1e-4)


@OPTIONS
def test_prepared_condition_equals_the_condition(options: dict[str, int]) -> None:
    denoiser, (x_n, step), condition = make(**options), random_inputs(), random_condition()
    assert torch.equal(denoiser(x_n, step, denoiser.prepare(condition)), denoiser(x_n, step, condition))


@OPTIONS
def test_absent_neighbors_equal_a_shorter_list(options: dict[str, int]) -> None:
    denoiser, (x_n, step), full = make(**options), random_inputs(), random_condition(slots=6)
    shorter = Condition(y=full.y[:, :4], present=full.present[:, :4])
    absent = Condition(y=full.y, present=full.present & (torch.arange(6) < 4))
    torch.testing.assert_close(denoiser(x_n, step, absent), denoiser(x_n, step, shorter))
    padded = Condition(y=full.y * (torch.arange(6) < 4)[None, :, None], present=full.present)
    assert not torch.allclose(denoiser(x_n, step, padded), denoiser(x_n, step, shorter), atol=1e-4)


@OPTIONS
def test_a_row_without_any_present_slot_equals_the_null(options: dict[str, int]) -> None:
    denoiser, (x_n, step), condition = make(**options), random_inputs(), random_condition()
    nothing = Condition(y=condition.y, present=torch.zeros_like(condition.present))
    assert torch.equal(denoiser(x_n, step, nothing), denoiser(x_n, step, null_condition(condition)))
    denoiser(x_n, step, nothing).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in denoiser.parameters() if p.grad is not None)


@OPTIONS
def test_order_of_neighbors_does_not_matter_but_the_query_has_its_place(options: dict[str, int]) -> None:
    denoiser, (x_n, step), condition = make(**options), random_inputs(), random_condition()
    out = denoiser(x_n, step, condition)
    shuffled = replace(condition, y=condition.y[:, [0, 3, 1, 2]])
    torch.testing.assert_close(denoiser(x_n, step, shuffled), out)
    query_moved = replace(condition, y=condition.y[:, [1, 0, 2, 3]])
    assert not torch.allclose(denoiser(x_n, step, query_moved), out, atol=1e-3)


@pytest.mark.parametrize("slots", [1, 2])
def test_query_alone_and_one_neighbor_are_conditions_too(slots: int) -> None:
    denoiser, (x_n, step) = make(), random_inputs()
    assert denoiser(x_n, step, random_condition(slots=slots)).isfinite().all()


@OPTIONS
def test_both_halves_of_guidance_as_one_batch_equal_them_separately(options: dict[str, int]) -> None:
    denoiser, (x_n, step), condition = make(**options), random_inputs(), random_condition()
    halves = [denoiser.prepare(condition), denoiser.prepare(null_condition(condition))]
    both = denoiser(torch.cat([x_n, x_n]), torch.cat([step, step]), PreparedCondition.cat(halves))
    apart = torch.cat([denoiser(x_n, step, half) for half in halves])
    torch.testing.assert_close(both, apart)


@pytest.mark.parametrize("rows", [slice(1, 3), [2, 0], torch.tensor([1, 1])])
@OPTIONS
def test_selected_rows_equal_the_condition_of_those_images(
    rows: slice | list[int] | Tensor, options: dict[str, int]
) -> None:
    denoiser, (x_n, step), condition = make(**options), random_inputs(), random_condition()
    picked = denoiser.prepare(condition).select(rows)
    expected = denoiser(x_n, step, condition)[rows]
    torch.testing.assert_close(denoiser(x_n[rows], step[rows], picked), expected)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
@OPTIONS
def test_every_patch_size_has_the_same_interface_and_learns_everywhere(
    patch_size: int, options: dict[str, int]
) -> None:
    denoiser, (x_n, step) = make(**options | {"patch_size": patch_size}), random_inputs()
    logits = denoiser(x_n, step, random_condition())
    assert logits.shape == (3, SMALL.seq, SMALL.vocab_size)
    (logits * torch.randn_like(logits)).sum().backward()
    assert [name for name, p in denoiser.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_only_the_first_coordinates_of_the_query_are_read() -> None:
    denoiser, (x_n, step), condition = make(query_dim=5, map_width=16), random_inputs(), random_condition()
    out = denoiser(x_n, step, condition)

    def changed(slot: int, coordinate: int) -> Tensor:
        y = condition.y.clone()
        y[:, slot, coordinate] += 1
        return denoiser(x_n, step, replace(condition, y=y))

    assert torch.equal(changed(0, 5), out)
    assert not torch.allclose(changed(0, 4), out, atol=1e-4)
    assert not torch.allclose(changed(1, 5), out, atol=1e-4)
    louder = replace(condition, y=torch.cat([condition.y[:, :1] * 3, condition.y[:, 1:]], dim=1))
    torch.testing.assert_close(denoiser(x_n, step, louder), out)
    assert torch.equal(
        denoiser(x_n, step, null_condition(condition)), make(map_width=16)(x_n, step, null_condition(condition))
    )


def with_codes(seed: int = 0, **options: int) -> Denoiser:
    denoiser = make(seed, code_dim=3, **options)
    torch.manual_seed(seed + 1)
    denoiser.code_traits.take(torch.randn(SMALL.vocab_size, 3) * torch.tensor([2.0, 1.0, 0.1]))
    return denoiser


@pytest.mark.parametrize("patch_size", [1, 2])
def test_code_traits_add_to_every_row_of_table_and_head(patch_size: int) -> None:
    denoiser, (x_n, step), condition = with_codes(patch_size=patch_size), random_inputs(), random_condition()
    plain, traits = make(patch_size=patch_size), denoiser.code_traits
    plain.load_state_dict({name: value for name, value in denoiser.state_dict().items() if "code_traits" not in name})
    with torch.no_grad():
        plain.token_table.weight[:-1] += traits.traits @ traits.table.weight.T
        for number, rows in enumerate(plain.head.weight.view(patch_size**2, SMALL.vocab_size, -1)):
            rows.add_(traits.traits @ traits.head.weight[6 * number : 6 * number + 6])
    torch.testing.assert_close(denoiser(x_n, step, condition), plain(x_n, step, condition))
    masked = torch.full_like(x_n, SMALL.mask_id)
    torch.testing.assert_close(denoiser.embed(masked), plain.embed(masked))


def test_logits_of_traits_can_be_any_normal_distribution_over_latents() -> None:
    codes = torch.randn(40, 3, dtype=torch.float64)
    traits = with_codes().double().code_traits
    traits.register_buffer("traits", torch.zeros(40, 6, dtype=torch.float64))
    traits.take(codes)
    mean, precision = torch.tensor([0.3, -1.0, 0.5]).double(), torch.tensor([4.0, 0.5, 9.0]).double()
    wanted = (-precision * (codes - mean).square() / 2).sum(1).log_softmax(0)
    columns = torch.cat([traits.traits, torch.ones(40, 1, dtype=torch.float64)], dim=1)
    weights = torch.linalg.lstsq(columns, wanted[:, None]).solution
    torch.testing.assert_close((columns @ weights)[:, 0], wanted)


def test_traits_are_saved_with_the_weights_and_learned_from() -> None:
    denoiser, (x_n, step) = with_codes(), random_inputs()
    assert "code_traits.traits" in denoiser.state_dict()
    denoiser(x_n, step, random_condition()).square().sum().backward()
    assert denoiser.code_traits.table.weight.grad.any()
    assert denoiser.code_traits.head.weight.grad.any()


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


@OPTIONS
def test_bfloat16_weights_and_autocast_stay_close_to_float32(options: dict[str, int]) -> None:
    denoiser, (x_n, step), condition = make(**options), random_inputs(), random_condition()
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
    with_null = denoiser(x_n, step, null_condition(random_condition()))
    for block in denoiser.blocks:
        monkeypatch.setattr(block.cross_attention, "forward", lambda h, *_: torch.zeros_like(h))
    assert torch.equal(with_null, denoiser(x_n, step, random_condition()))


def test_gradients_flow_under_autocast() -> None:
    denoiser, (x_n, step) = make(), random_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = denoiser(x_n, step, random_condition())
    functional.cross_entropy(logits.flatten(0, 1), torch.randint(0, SMALL.vocab_size, (3 * SMALL.seq,))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in denoiser.parameters())


def test_a_step_table_gives_every_norm_its_own_rows() -> None:
    denoiser, (x_n, _), condition = make(step_table=True), random_inputs(), random_condition()
    step = torch.tensor([1, 4, SMALL.num_steps])
    rows = denoiser.modulate(step)
    for row, n in enumerate(step):
        for block in range(SMALL.depth):
            assert torch.equal(rows[block, :, row, 0], denoiser.step_embedding.table[n - 1, block])
    out = denoiser(x_n, step, condition)
    with torch.no_grad():
        denoiser.step_embedding.table[3, 1, 2] += 1  # step 4, the second block's cross-attention
    changed = (denoiser(x_n, step, condition) != out).flatten(1).any(1)
    assert changed.tolist() == [False, True, False]
    for outside in (0, SMALL.num_steps + 1):
        with pytest.raises(IndexError):
            denoiser(x_n, torch.full((3,), outside), condition)


def test_plain_slots_are_read_as_they_come() -> None:
    denoiser, (x_n, step), condition = make(plain_slots=True), random_inputs(), random_condition()
    out = denoiser(x_n, step, condition)
    torch.testing.assert_close(denoiser(x_n, step, replace(condition, y=condition.y[:, [3, 1, 2, 0]])), out)
    projected = make()
    for layer in (projected.query_slot, projected.neighbor_slots):
        layer.weight.data = torch.eye(SMALL.condition_dim) / SMALL.condition_dim**0.5
    projected.load_state_dict(denoiser.state_dict(), strict=False)
    torch.testing.assert_close(projected(x_n, step, condition), out)


def test_the_sigmoid_gelu_is_near_the_exact_one_but_not_equal() -> None:
    x = torch.linspace(-4, 4, 100)
    difference = (sigmoid_gelu(x) - functional.gelu(x)).abs().max()
    assert 0.01 < difference < 0.03


@pytest.mark.parametrize("option", ["step_table", "plain_slots", "sigmoid_gelu"])
def test_options_of_vq_diffusion_train_too(option: str) -> None:
    denoiser, (x_n, step) = make(**{option: True}), random_inputs()
    denoiser(x_n, step, random_condition()).square().sum().backward()
    assert [name for name, p in denoiser.named_parameters() if p.grad is None or not p.grad.any()] == []


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
    with pytest.raises(ConfigError, match="map_width must be a multiple of 16, got 24"):
        replace(SMALL, map_width=24)
    with pytest.raises(ConfigError, match="local_blocks must be above 0 with local_width only, got 0"):
        replace(SMALL, local_width=8)
    with pytest.raises(
        ConfigError, match="grid_neighbors must be 0 without local_width, whose layers read them, got 2"
    ):
        replace(SMALL, grid_neighbors=2, grid_layers=1)
    with pytest.raises(ConfigError, match="grid_layers must be from 1 to 2 with grid_neighbors 3, got 0"):
        replace(SMALL, **GRIDS | {"grid_layers": 0})
    with pytest.raises(ConfigError, match="copy_window must be odd, or 0, got 2"):
        replace(SMALL, **GRIDS | {"copy_window": 2})
    with pytest.raises(ConfigError, match="copy_window must be 0 without grid_neighbors, whose codes it copies, got 3"):
        replace(SMALL, copy_window=3)
    with pytest.raises(ConfigError, match="query_dim must be at most condition_dim 12, got 13"):
        replace(SMALL, query_dim=13)
    with pytest.raises(ConfigError, match="query_dim must be 0 with plain_slots, which know no query, got 3"):
        replace(SMALL, query_dim=3, plain_slots=True)
    for field in ("vocab_size", "grid", "width", "depth", "heads", "condition_dim", "num_steps", "mlp_ratio"):
        with pytest.raises(ConfigError, match=f"{field} must be at least 1, got 0: change {field}"):
            replace(SMALL, **{field: 0})


def test_wrong_widths_and_lengths_are_refused() -> None:
    denoiser, (x_n, step), condition = make(), random_inputs(), random_condition()
    with pytest.raises(FingerprintError, match="reads 12-d embeddings, the condition has 9-d ones: use the encoder"):
        denoiser(x_n, step, replace(condition, y=condition.y[..., :9]))
    with pytest.raises(UsageError, match="works on 4 × 4 tokens, got 15 in a row: use the tokenizer"):
        denoiser(x_n[:, :15], step, condition)
    denoiser = make(**GRIDS)
    more = condition.grids.repeat(1, 2, 1)
    with pytest.raises(UsageError, match="reads 3 grids of 16 tokens at most, got 6 of 16: leave out the others"):
        denoiser.prepare(replace(condition, grids=more, grids_present=torch.ones(3, 6, dtype=torch.bool)))
    with pytest.raises(
        UsageError, match="reads 3 grids of 16 tokens at most, got 3 of 15: .* use the tokenizer it was"
    ):
        denoiser.prepare(replace(condition, grids=condition.grids[..., :15]))
