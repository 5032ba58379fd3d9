"""The image tokenizer: deterministic round trips, a codebook in use, gradients that go where they should."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from knn_diffusion.config import from_dict, to_dict
from knn_diffusion.errors import ConfigError, UsageError
from knn_diffusion.models.tokenizer import (
    MEDIUM,
    PAPER,
    SMALL,
    VQGAN,
    Quantizer,
    TokenizerConfig,
    codebook_perplexity,
    cosine_filters,
)

TINY = TokenizerConfig(image_size=16, grid=4, vocab_size=32, code_dim=6, channels=8, decoder_blocks=1)


def tiny(config: TokenizerConfig = TINY, seed: int = 0) -> VQGAN:
    torch.manual_seed(seed)
    return VQGAN(config).eval()


def smooth_images(count: int, size: int = 16, seed: int = 0) -> Tensor:
    """Random colour gradients in [-1, 1]."""
    coarse = torch.rand(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=size, mode="bilinear", align_corners=False)


def test_tokens_are_codes_of_a_grid_and_decode_to_pixels_within_their_range() -> None:
    model, images = tiny(), smooth_images(3)
    tokens = model.encode(images)
    assert tokens.shape == (3, 16)
    assert tokens.dtype == torch.int64
    assert int(tokens.min()) >= 0
    assert int(tokens.max()) < model.vocab_size
    pixels = model.decode(tokens)
    assert pixels.shape == images.shape
    assert pixels.dtype == torch.float32
    assert float(pixels.abs().max()) <= 1


def test_encoding_the_same_image_twice_gives_the_same_tokens_in_training_mode_too() -> None:
    model, images = tiny(), smooth_images(2)
    once = model.encode(images)
    model.train()
    assert torch.equal(model.encode(images), once)
    assert torch.equal(model(images).tokens, once)


def test_encoding_neither_moves_codes_nor_touches_global_randomness() -> None:
    model, before = tiny(), torch.get_rng_state()
    codes = model.quantizer.codes.clone()
    model.train().encode(smooth_images(2))
    model(smooth_images(2))
    assert torch.equal(model.quantizer.codes, codes)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_tokenizer_chooses_the_nearest_code() -> None:
    quantizer = tiny().quantizer
    vectors = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    slow = torch.stack([(quantizer.codes - v).square().sum(1).argmin() for v in vectors])
    assert torch.equal(quantizer.nearest(vectors), slow)


def test_bfloat16_training_chooses_the_codes_that_float32_would() -> None:
    quantizer = tiny(replace(TINY, vocab_size=512)).quantizer
    vectors = torch.randn(2000, 6, generator=torch.Generator().manual_seed(1))
    exact = quantizer.nearest(vectors)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.nearest(vectors), exact)


def test_the_gradient_passes_straight_through_the_quantizer() -> None:
    quantizer = tiny().quantizer
    latents = torch.randn(2, 6, 4, 4, requires_grad=True)
    quantized, _, _ = quantizer(latents, None)
    wanted = torch.randn(quantized.shape)
    (quantized * wanted).sum().backward()
    assert torch.equal(latents.grad, wanted)


def test_commitment_pulls_the_encoder_to_its_codes_and_nothing_else() -> None:
    model = tiny().train()
    latents = model.encoder(smooth_images(2)).detach().requires_grad_()
    quantized, tokens, commitment = model.quantizer(latents, None)
    commitment.backward()
    codes = model.quantizer.codes[tokens].view(2, 4, 4, 6).permute(0, 3, 1, 2)
    assert torch.allclose(latents.grad, 2 * (latents.detach() - codes) / latents.numel(), atol=1e-7)
    assert torch.allclose(commitment, (latents - quantized).square().mean())
    assert not any("quantizer" in name for name, _ in model.named_parameters())


def test_codes_move_to_the_mean_of_their_vectors() -> None:
    config = TokenizerConfig(
        image_size=16, grid=4, vocab_size=2, code_dim=2, channels=8, codebook_decay=0.0, restart_share=0.0
    )
    quantizer = Quantizer(config)
    quantizer.codes.copy_(torch.tensor([[0.0, 0.0], [9.0, 9.0]]))
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [8.0, 9.0]])
    quantizer.update(vectors, quantizer.nearest(vectors), torch.Generator())
    assert torch.allclose(quantizer.codes, torch.tensor([[0.5, 0.5], [8.0, 9.0]]))
    assert torch.allclose(quantizer.share, torch.tensor([2 / 3, 1 / 3]))


def test_the_running_mean_weighs_batches_as_an_exponential_moving_average_of_sums() -> None:
    config = TokenizerConfig(
        image_size=16, grid=4, vocab_size=2, code_dim=2, channels=8, codebook_decay=0.9, restart_share=0.0
    )
    quantizer, generator = Quantizer(config), torch.Generator().manual_seed(3)
    sums, counts = torch.zeros(2, 2), torch.zeros(2)
    for _ in range(6):
        vectors = torch.randn(40, 2, generator=generator)
        chosen = quantizer.nearest(vectors)
        one_hot = torch.nn.functional.one_hot(chosen, 2).float()
        counts = 0.9 * counts + 0.1 * one_hot.mean(0)
        sums = 0.9 * sums + 0.1 * one_hot.T @ vectors / 40
        quantizer.update(vectors, chosen, generator)
    assert torch.allclose(quantizer.codes, sums / counts[:, None], atol=1e-5)


def test_a_code_nobody_uses_is_restarted_on_a_vector_of_the_batch() -> None:
    quantizer, generator = tiny().quantizer, torch.Generator().manual_seed(0)
    vectors = torch.randn(200, 6, generator=generator)
    quantizer.codes[5] = 1e3
    quantizer.share.fill_(1 / 32)
    for _ in range(300):
        quantizer.update(vectors, quantizer.nearest(vectors), generator)
    assert float(quantizer.codes.abs().max()) < 10
    assert len(quantizer.nearest(vectors).unique()) == 32


def test_codes_far_from_all_images_come_into_use_within_a_few_steps() -> None:
    quantizer, generator = tiny().quantizer, torch.Generator().manual_seed(0)
    quantizer.codes.add_(100)
    for _ in range(20):
        vectors = torch.randn(256, 6, generator=generator)
        quantizer.update(vectors, quantizer.nearest(vectors), generator)
    used = len(quantizer.nearest(torch.randn(4096, 6, generator=generator)).unique())
    assert used / 32 > 0.9


def test_the_codebook_learns_the_same_from_equal_generators() -> None:
    learned = []
    for _ in range(2):
        model = tiny().train()
        model(smooth_images(4), torch.Generator().manual_seed(7))
        learned.append(model.quantizer.codes)
    assert torch.equal(*learned)


def test_cosine_filters_are_orthonormal_and_begin_with_the_mean_brightness() -> None:
    filters = cosine_filters(48, 4).flatten(1)
    assert torch.allclose(filters @ filters.T, torch.eye(48), atol=1e-5)
    assert torch.allclose(filters[0], torch.full((48,), 48**-0.5))


def test_cosine_filters_of_transparent_images_begin_with_brightness_and_alpha() -> None:
    filters = cosine_filters(64, 4, channels=4)
    assert torch.allclose(filters.flatten(1) @ filters.flatten(1).T, torch.eye(64), atol=1e-5)
    assert filters[0, 3].abs().max() < 1e-6 < filters[0, :3].min()
    assert filters[1, :3].abs().max() < 1e-6 < filters[1, 3].min()


def test_an_untrained_tokenizer_keeps_what_the_coarse_cosines_keep() -> None:
    model, images = tiny(replace(TINY, code_dim=16)), smooth_images(8)
    kept = model.decoder(model.encoder(images)).detach()
    assert float((kept - images).square().mean()) < 0.05 * float(images.var())


@settings(max_examples=8, deadline=None)
@given(
    patch=st.sampled_from([1, 2, 4]), levels=st.integers(1, 3), grid=st.sampled_from([2, 4]), attention=st.booleans()
)
def test_every_shape_of_network_returns_images_of_the_size_it_was_given(
    patch: int, levels: int, grid: int, attention: bool
) -> None:
    size = grid * patch * 2 ** (levels - 1)
    multipliers = (1, 2, 2)[:levels]
    code_dim = min(4, 3 * (size // grid) ** 2)
    model = tiny(
        TokenizerConfig(
            image_size=size,
            grid=grid,
            vocab_size=8,
            code_dim=code_dim,
            patch=patch,
            channels=8,
            channel_multipliers=multipliers,
            attention=attention,
        )
    )
    images = smooth_images(2, size)
    assert model(images).pixels.shape == images.shape
    assert model.encode(images).shape == (2, grid**2)


def test_presets_are_consistent_and_the_bundled_one_fits_six_megabytes() -> None:
    for preset in (SMALL, MEDIUM, PAPER):
        assert from_dict(TokenizerConfig, to_dict(preset)) == preset
    with torch.device("meta"):
        numbers = sum(p.numel() for p in VQGAN(SMALL).state_dict().values())
    assert 2 * numbers < 6e6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 60}, r"image_size must be grid × 4 = 64, got 60"),
        ({"channels": 12}, r"channels must be a multiple of 8, got 12"),
        ({"channel_multipliers": ()}, r"channel_multipliers must be one or more positive integers"),
        ({"code_dim": 49}, r"code_dim must be at most the 48 numbers of a 4-pixel cell, got 49"),
        ({"codebook_decay": 1.0}, r"codebook_decay must be in \[0, 1\)"),
    ],
)
def test_an_impossible_configuration_is_refused_with_its_rule(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TokenizerConfig(**changes)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(UsageError, match=r"expected images \[batch, 3, 16, 16\], got \[1, 3, 8, 8\]: resize"):
        tiny().encode(torch.zeros(1, 3, 8, 8))


def test_the_mask_is_no_code() -> None:
    with pytest.raises(UsageError, match=r"expected tokens in \[0, 32\), got 0 … 32: denoise every \[MASK\] first"):
        tiny().decode(torch.tensor([[0] * 15 + [32]]))
    with pytest.raises(UsageError, match=r"expected tokens \[batch, 16\], got \[1, 9\]"):
        tiny().decode(torch.zeros(1, 9, dtype=torch.int64))


def test_perplexity_counts_equally_used_codes() -> None:
    assert codebook_perplexity(torch.tensor([5.0, 5, 5, 0])) == pytest.approx(3)
    assert codebook_perplexity(torch.tensor([0.0, 7])) == pytest.approx(1)
