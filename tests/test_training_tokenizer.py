"""Training of the tokenizer: what each phase may move, what is measured, what is written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from knn_diffusion.checkpoint import load_part
from knn_diffusion.config import from_dict
from knn_diffusion.errors import CheckpointError, ConfigError, UsageError
from knn_diffusion.images import from_array, pixels_from_uint8
from knn_diffusion.models.discriminator import PatchDiscriminator
from knn_diffusion.models.efficientnet import EfficientNet, EfficientNetConfig, Stage
from knn_diffusion.models.tokenizer import TokenizerConfig
from knn_diffusion.models.tokenizers import load_tokenizer
from knn_diffusion.training.data import PixelDataset
from knn_diffusion.training.loop import train
from knn_diffusion.training.options import RunOptions
from knn_diffusion.training.perceptual import PERCEPTIONS, FeaturePerception
from knn_diffusion.training.plan import TrainingConfig
from knn_diffusion.training.tokenizer import TokenizerLossConfig, TokenizerObjective, TokenizerRun, train_tokenizer

RUN = TokenizerRun(
    tokenizer=TokenizerConfig(image_size=16, grid=4, vocab_size=16, code_dim=8, channels=8, decoder_blocks=1),
    training=TrainingConfig(
        num_steps=30, batch_size=8, learning_rate=3e-3, warmup_steps=2, ema_decay=0.8, precision="float32"
    ),
    loss=TokenizerLossConfig(discriminator_start=2, adversarial_start=4),
)


def discs(count: int, size: int = 16) -> np.ndarray:
    """Discs of random colour and place on plain grounds, uint8."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    images = np.empty((count, size, size, 3), np.uint8)
    for image in images:
        inside = np.hypot(x - rng.uniform(4, 12), y - rng.uniform(4, 12)) < rng.uniform(3, 6)
        image[:] = np.where(inside[..., None], rng.integers(0, 256, 3), rng.integers(0, 256, 3))
    return images


def cut_out_discs(count: int) -> np.ndarray:
    """The same discs with their right half transparent, uint8 RGBA."""
    alpha = np.full((count, 16, 16, 1), 255, np.uint8)
    alpha[:, :, 8:] = 0
    return np.concatenate([discs(count), alpha], axis=-1)


def objective(run: TokenizerRun = RUN) -> TokenizerObjective:
    torch.manual_seed(0)
    return TokenizerObjective(run, discs(16))


def losses(of: TokenizerObjective, step: int) -> list[dict[str, Tensor] | None]:
    batch = {"pixels": pixels_from_uint8(discs(8))}
    return [phase.loss(batch, step, torch.Generator().manual_seed(step)) for phase in of.phases()]


def test_the_discriminator_learns_before_the_generator_listens_to_it() -> None:
    toy = objective()
    heard = []
    for step in (1, 2, 3, 4):
        generator, discriminator = losses(toy, step)
        heard.append((discriminator is not None, "adversarial" in generator))
    assert heard == [(False, False), (True, False), (True, False), (True, True)]


def test_each_phase_moves_only_its_own_network() -> None:
    toy = objective()
    generator, discriminator = losses(toy, 5)
    generator["loss"].backward()
    assert all(p.grad is None for p in toy.discriminator.parameters())
    assert all(p.grad is not None for p in toy.tokenizer.encoder.parameters())
    toy.tokenizer.zero_grad()
    discriminator["loss"].backward()
    assert all(p.grad is None for p in toy.tokenizer.parameters())
    assert all(p.grad is not None for p in toy.discriminator.parameters())


def test_without_adversarial_weights_no_discriminator_is_trained() -> None:
    loss = replace(RUN.loss, adversarial_weight=0.0, feature_weight=0.0)
    generator, discriminator = losses(objective(replace(RUN, loss=loss)), 100)
    assert discriminator is None
    assert "adversarial" not in generator


def test_a_short_run_draws_better_and_uses_the_codebook(tmp_path: Path) -> None:
    toy = objective()
    before = toy.validate(toy.network.eval(), 0, torch.Generator()).metrics
    result = train(toy, PixelDataset(discs(64)), RUN.training, RunOptions(output=tmp_path, device="cpu"))
    assert result.metrics["validation/psnr"] > before["psnr"] + 2
    assert result.metrics["validation/codebook_usage"] > 0.9
    assert 1 <= result.metrics["validation/codebook_perplexity"] <= 16
    saved, _ = load_tokenizer(tmp_path / "model")
    assert torch.equal(
        saved.quantizer.codes, toy.tokenizer.quantizer.codes.half().float()
    )  # weights are averaged, codes not


def test_a_short_run_on_transparent_images_learns_alpha_and_ignores_hidden_colours(tmp_path: Path) -> None:
    run = replace(RUN, tokenizer=replace(RUN.tokenizer, alpha=True))
    torch.manual_seed(0)
    toy = TokenizerObjective(run, cut_out_discs(16))
    result = train(toy, PixelDataset(cut_out_discs(64)), run.training, RunOptions(output=tmp_path, device="cpu"))
    assert result.metrics["tokenizer/alpha"] < 0.05
    shown, hidden = cut_out_discs(8), cut_out_discs(8)
    hidden[:, :, 8:, :3] = 200
    saved, _ = load_tokenizer(tmp_path / "model")
    assert saved.alpha
    tokens = saved.encode(pixels_from_uint8(shown))
    assert torch.equal(tokens, saved.encode(pixels_from_uint8(hidden)))
    assert saved.decode(tokens).shape == (8, 4, 16, 16)


def test_losses_of_transparent_images_are_those_over_a_ground_for_each_image() -> None:
    run = replace(RUN, tokenizer=replace(RUN.tokenizer, alpha=True))
    torch.manual_seed(0)
    toy = TokenizerObjective(run, cut_out_discs(8))
    real = pixels_from_uint8(cut_out_discs(8))
    parts = toy.generator_loss({"pixels": real}, 1, torch.Generator().manual_seed(3))
    seen, drawn = toy._seen
    ground, alpha = seen[:, :, :1, -1:], (real[:, 3:] + 1) / 2
    assert len(ground.unique(dim=0)) == 8
    assert torch.allclose(seen, real[:, :3] + (1 - alpha) * ground)
    assert parts["pixel"].item() == pytest.approx((drawn - seen).abs().mean().item(), rel=1e-5)


def test_validation_reports_what_the_network_really_does() -> None:
    toy = objective()
    report = toy.validate(toy.network.eval(), 0, torch.Generator())
    real = pixels_from_uint8(discs(16))
    drawn = toy.tokenizer.decode(toy.tokenizer.encode(real))
    assert report.metrics["l1"] == pytest.approx(float((drawn - real).abs().mean()), rel=1e-4)
    assert report.metrics["psnr"] == pytest.approx(
        float(10 * torch.log10(4 / (drawn - real).square().mean())), rel=1e-4
    )
    assert report.preview is not None


def test_what_is_exported_is_half_precision_and_encodes_the_same_after_loading(tmp_path: Path) -> None:
    toy = objective()
    toy.export(toy.network.half().float(), tmp_path / "tokenizer", {"steps": 7})
    part = load_part(tmp_path / "tokenizer", kind="tokenizer", config_class=TokenizerConfig)
    assert {value.dtype for value in part.weights.values()} == {torch.float16}
    assert from_dict(TokenizerRun, part.extra["run"]) == RUN
    assert part.extra["steps"] == 7
    loaded, _ = load_tokenizer(tmp_path / "tokenizer")
    images = pixels_from_uint8(discs(16))
    tokens = toy.tokenizer.eval().encode(images)
    assert torch.equal(loaded.encode(images), tokens)
    assert torch.equal(loaded.decode(tokens), toy.tokenizer.decode(tokens))


def test_a_run_can_start_from_a_trained_tokenizer_of_the_same_shape_only(tmp_path: Path) -> None:
    trained = objective()
    trained.export(trained.network.half().float(), tmp_path / "tokenizer", {})
    fresh = objective()
    fresh.start_from(tmp_path / "tokenizer")
    for name, value in fresh.tokenizer.state_dict().items():
        assert torch.equal(value, trained.tokenizer.state_dict()[name])
    other = replace(RUN, tokenizer=replace(RUN.tokenizer, vocab_size=8))
    with pytest.raises(CheckpointError, match=r"expected quantizer\.codes of shape \(8, 8\), got \(16, 8\)"):
        objective(other).start_from(tmp_path / "tokenizer")


def test_training_the_decoder_alone_changes_pixels_and_no_token(tmp_path: Path) -> None:
    for number, array in enumerate(discs(40)):
        (tmp_path / "images").mkdir(exist_ok=True)
        from_array(array).save(tmp_path / "images" / f"{number}.png")
    first = objective()
    first.export(first.network.half().float(), tmp_path / "first", {})
    run = replace(RUN, decoder_only=True)
    options = RunOptions(output=tmp_path / "run", device="cpu")
    train_tokenizer(run, [tmp_path / "images"], options, init=tmp_path / "first")
    before, _ = load_tokenizer(tmp_path / "first")
    after, _ = load_tokenizer(tmp_path / "run" / "model")
    real = pixels_from_uint8(discs(16))
    tokens = before.encode(real)
    assert torch.equal(after.encode(real), tokens)
    assert (after.decode(tokens) - real).abs().mean() < (before.decode(tokens) - real).abs().mean()
    with pytest.raises(UsageError, match=r"expected a tokenizer whose decoder is trained alone.*--init"):
        train_tokenizer(run, [tmp_path / "images"], RunOptions(output=tmp_path / "other", device="cpu"))


@pytest.mark.parametrize("name", PERCEPTIONS)
def test_every_perception_is_zero_for_equal_images_and_alike_each_time(name: str) -> None:
    real = pixels_from_uint8(discs(4))
    blurred = torch.nn.functional.avg_pool2d(real, 3, 1, 1)
    one, two = PERCEPTIONS[name](), PERCEPTIONS[name]()
    assert float(one(real, real)) == pytest.approx(0, abs=1e-6)
    assert float(one(blurred, real)) == float(two(blurred, real))
    assert (float(one(blurred, real)) > 0.01) == (name != "none")


def test_features_of_a_backbone_compare_images_and_leave_the_backbone_alone() -> None:
    torch.manual_seed(0)
    stages = (Stage(width=8, blocks=1, kernel=3, stride=1, expand=1), Stage(width=8, blocks=1, kernel=3, stride=2))
    backbone = EfficientNet(EfficientNetConfig(stem_width=8, stages=stages, width=16))
    perceive, real = FeaturePerception(backbone, maps=3), pixels_from_uint8(discs(4))
    blurred = torch.nn.functional.avg_pool2d(real, 3, 1, 1).requires_grad_()
    distance = perceive(blurred, real)
    assert perceive(real, real).item() == pytest.approx(0, abs=1e-6)
    unit = [torch.nn.functional.normalize(one, dim=1) for one in backbone.stages(real, 3)]
    other = [torch.nn.functional.normalize(one, dim=1) for one in backbone.stages(blurred, 3)]
    pairs = zip(unit, other, strict=True)
    slow = sum(((a - b).square().sum() / len(a) / a[0, 0].numel()).item() for a, b in pairs)
    assert distance.item() == pytest.approx(slow, rel=1e-4)
    distance.backward()
    assert blurred.grad.abs().sum() > 0
    assert all(one.grad is None for one in backbone.parameters())


def test_a_backbone_weight_without_a_backbone_is_refused_with_the_cure(tmp_path: Path) -> None:
    run = replace(RUN, loss=replace(RUN.loss, backbone_weight=1.0))
    for number, array in enumerate(discs(3)):
        from_array(array).save(tmp_path / f"{number}.png")
    with pytest.raises(UsageError, match=r"expected a pretrained backbone.*--backbone"):
        train_tokenizer(run, [tmp_path], RunOptions(output=tmp_path / "run", device="cpu"))


def test_edges_punish_a_blurred_contour_more_than_a_shifted_colour() -> None:
    real = pixels_from_uint8(discs(8))
    blurred = torch.nn.functional.avg_pool2d(real, 5, 1, 2)
    shifted = real + (blurred - real).abs().mean()
    perceive = PERCEPTIONS["edges"]()
    assert float(perceive(shifted, real)) < 1e-5 < float(perceive(blurred, real))


def test_the_discriminator_judges_squares_and_images_apart_from_their_batch() -> None:
    torch.manual_seed(0)
    critic, images = PatchDiscriminator(channels=8), pixels_from_uint8(discs(4, 32))
    logits, features = critic(images)
    assert logits.shape == (4, 1, 4, 4)
    assert [f.shape[1] for f in features] == [8, 16, 32]
    assert torch.allclose(critic(images[:1])[0], logits[:1], atol=1e-5)


def test_the_generator_cannot_be_told_to_listen_before_there_is_an_opinion() -> None:
    with pytest.raises(ConfigError, match="adversarial_start must be at least discriminator_start"):
        TokenizerLossConfig(discriminator_start=5, adversarial_start=4)
