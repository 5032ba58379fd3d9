from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from knn_diffusion import stickers
from knn_diffusion.errors import CheckpointError, ConfigError
from knn_diffusion.models.judge import Judge, JudgeConfig, judge_digest, judge_images, load_judge, save_judge
from knn_diffusion.stickers.glyphs import glyph_file_name
from knn_diffusion.training import judge as training
from knn_diffusion.training.options import RunOptions
from knn_diffusion.training.plan import TrainingConfig
from knn_diffusion.training.roughening import roughen, wobble

SMALL = {"size": 32, "widths": (6, 8, 8), "depths": (0, 1, 0)}


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> stickers.FolderGlyphs:
    """Four training and two held-out concepts as coloured shapes, so that no font is needed."""
    folder = tmp_path_factory.mktemp("glyphs")
    usual = [concept for concept in stickers.concepts() if not concept.flat]
    chosen = stickers.of_split(usual, "train")[:4] + stickers.of_split(usual, "held-out")[:2]
    for number, concept in enumerate(chosen):
        glyph = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
        pen, colour = ImageDraw.Draw(glyph), (40 * number, 255 - 40 * number, 90, 255)
        pen.ellipse((0, 0, 59, 59), fill=colour) if number % 2 else pen.rectangle(
            (0, 0, 59, 30 + 5 * number), fill=colour
        )
        glyph.save(folder / glyph_file_name(concept.char))
    return stickers.FolderGlyphs(folder)


def small_judge(**changed: object) -> Judge:
    names = ("cat", "dog", "owl")
    return training.new_judge(JudgeConfig(**({"concepts": names, "colours": ("red", "blue")} | SMALL | changed)))


def test_the_default_judge_fits_its_budget_of_parameters_and_bytes(tmp_path: Path) -> None:
    names = tuple(concept.name for concept in stickers.concepts())
    judge = training.new_judge(JudgeConfig(concepts=names, colours=stickers.COLOURS))
    assert sum(p.numel() for p in judge.parameters()) < 2.2e6
    save_judge(judge, tmp_path / "judge")
    assert (tmp_path / "judge" / "model.safetensors").stat().st_size < 5e6


def test_a_saved_judge_judges_alike_and_keeps_its_digest(tmp_path: Path) -> None:
    judge = small_judge().eval()
    save_judge(judge, tmp_path / "judge", {"steps": 3})
    again = load_judge(tmp_path / "judge")
    pixels = torch.rand(2, 3, 32, 32) * 2 - 1
    assert again.config == judge.config
    assert judge_digest(again) == judge_digest(judge)
    torch.testing.assert_close(again(pixels).concept, judge(pixels).concept, atol=1e-2, rtol=1e-2)


def test_features_are_what_both_heads_read() -> None:
    judge = small_judge().eval()
    verdict = judge(torch.rand(2, 3, 32, 32))
    torch.testing.assert_close(judge.concept_head(verdict.features), verdict.concept)
    torch.testing.assert_close(judge.colour_head(verdict.features), verdict.colour)


def test_pictures_of_any_size_are_judged_one_like_many() -> None:
    judge = small_judge()
    pictures = [
        Image.new("RGB", (50, 80), "red"),
        Image.new("RGB", (32, 32), "blue"),
        Image.new("RGB", (9, 9), "green"),
    ]
    together = judge_images(judge, pictures, batch_size=2)
    alone = judge_images(judge, pictures[2:])
    assert together.concept.shape == (3, 3)
    assert together.features.dtype == np.float64
    np.testing.assert_allclose(together.colour[2], alone.colour[0], atol=1e-5)
    assert judge.training


def test_a_wrong_configuration_or_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="multiple of 16"):
        small_judge(size=40)
    with pytest.raises(CheckpointError, match="expected a judge"):
        load_judge(tmp_path)


def test_weights_follow_from_the_seed_and_leave_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    first, second = small_judge(), small_judge()
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_pair_asks_for_both_its_objects() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    log_probs = logits.log_softmax(-1)[0]
    one = training.concept_loss(logits, torch.tensor([[1, training.NO_CONCEPT]]), 0.0)
    both = training.concept_loss(logits, torch.tensor([[0, 1]]), 0.0)
    torch.testing.assert_close(one, -log_probs[1])
    torch.testing.assert_close(both, -(log_probs[0] + log_probs[1]) / 2)
    smoothed = training.concept_loss(logits, torch.tensor([[1, training.NO_CONCEPT]]), 0.1)
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor([1]), label_smoothing=0.1)
    torch.testing.assert_close(smoothed, expected)


def test_roughening_stays_in_range_and_follows_from_the_generator() -> None:
    pixels = torch.rand(8, 3, 32, 32) * 2 - 1
    first, second = (roughen(wobble(pixels, g), g) for g in (torch.Generator().manual_seed(1) for _ in range(2)))
    assert torch.equal(first, second)
    assert first.abs().max() <= 1
    assert not torch.equal(first, pixels)
    assert roughen(pixels[:1], torch.Generator()).shape == (1, 3, 32, 32)


def test_renders_are_labelled_made_once_and_one_fifth_pairs(glyphs: stickers.FolderGlyphs, tmp_path: Path) -> None:
    made = training.render_dataset(tmp_path, 20, training.TRAINING_SEED, 32, glyphs=glyphs)
    assert made.pixels.shape == (20, 32, 32, 3)
    assert (made.concepts[:, 1] != training.NO_CONCEPT).sum() == 4
    assert set(made.concepts[:, 0]) <= set(range(len(stickers.concepts(glyphs))))
    stamp = (tmp_path / "pixels.npy").stat().st_mtime_ns
    again = training.render_dataset(tmp_path, 20, training.TRAINING_SEED, 32, glyphs=glyphs)
    assert (tmp_path / "pixels.npy").stat().st_mtime_ns == stamp
    assert np.array_equal(made.pixels, again.pixels)
    plain = replace(made, roughened=False).batch(torch.tensor([3, 5]), torch.Generator())
    assert plain["pixels"].shape == (2, 3, 32, 32)
    assert plain["concepts"].tolist() == made.concepts[[3, 5]].tolist()


def test_a_tiny_judge_learns_what_it_is_shown(glyphs: stickers.FolderGlyphs, tmp_path: Path) -> None:
    config = TrainingConfig(
        num_steps=60,
        batch_size=32,
        learning_rate=1e-2,
        warmup_steps=5,
        ema_decay=0.9,
        validate_every=60,
        precision="float32",
    )
    result = training.train_judge(
        RunOptions(output=tmp_path, device="cpu"), config, num_images=200, num_validation=40, glyphs=glyphs, judge=small_judge_config(glyphs),
    )  # fmt: skip
    assert result.finished
    assert result.metrics["validation/top1"] > 0.6
    assert result.metrics["validation/colour"] > 0.4
    assert load_judge(tmp_path / "model").config.concepts == tuple(c.name for c in stickers.concepts(glyphs))


def small_judge_config(glyphs: stickers.FolderGlyphs) -> JudgeConfig:
    names = tuple(concept.name for concept in stickers.concepts(glyphs))
    return JudgeConfig(concepts=names, colours=stickers.COLOURS, size=32, widths=(8, 16, 32), depths=(0, 1, 1))
