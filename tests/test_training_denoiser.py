"""Training of the denoiser: what it is given, and the model folder it leaves."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_world import SIZE, build_model, draw_pictures

from knn_diffusion import ImageIndex
from knn_diffusion.config import from_dict
from knn_diffusion.diffusion.sampling import SamplerConfig
from knn_diffusion.errors import ConfigError, UsageError
from knn_diffusion.model_folder import load_model, write_pipeline_file
from knn_diffusion.models.tokenizers import load_tokenizer
from knn_diffusion.training import neighbors
from knn_diffusion.training.data import load_pixels
from knn_diffusion.training.denoiser import DenoiserRun, train_denoiser
from knn_diffusion.training.neighbors import ABSENT, prepare
from knn_diffusion.training.options import RunOptions


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures and two models that read them differently."""
    place = tmp_path_factory.mktemp("world")
    draw_pictures(place / "pictures")
    build_model(place / "model", place / "pictures")
    build_model(place / "other", place / "pictures", seed=1)
    return place


def tiny_run(world: Path, num_steps: int = 1, k: int = 2) -> DenoiserRun:
    facts = json.loads((world / "model" / "denoiser" / "config.json").read_text())
    training = {"batch_size": 4, "num_steps": num_steps, "learning_rate": 1e-3, "warmup_steps": 0}
    values = {"denoiser": facts["config"], "schedule": facts["extra"]["schedule"], "training": training}
    return from_dict(DenoiserRun, values | {"conditioning": {"k": k}})


def train(
    world: Path, output: Path, *, index: str = "model", tokenizer: str = "model", num_steps: int = 1, k: int = 2
) -> None:
    with ImageIndex.open(world / index / "index") as opened:
        train_denoiser(
            tiny_run(world, num_steps, k),
            [world / "pictures"],
            opened,
            RunOptions(output=output, resume=num_steps > 1, device="cpu"),
            tokenizer=world / tokenizer / "tokenizer",
        )


def test_no_image_is_its_own_neighbor(world: Path, tmp_path: Path) -> None:
    pixels = load_pixels([world / "pictures"], SIZE, tmp_path)
    tokenizer, _ = load_tokenizer(world / "model" / "tokenizer")
    with ImageIndex.open(world / "model" / "index") as index:
        data = prepare(pixels, index, tokenizer, 3, tmp_path)
        ids = np.array([*index.ids, ""])
    assert all(own not in ids[row] for own, row in zip(pixels.ids, data.neighbors, strict=True))
    batch = data.batch(torch.tensor([0, 5]), torch.Generator())
    assert torch.equal(batch["present"], torch.from_numpy(data.neighbors[[0, 5]] != ABSENT))
    assert batch["neighbors"].shape == (2, 3, batch["query"].shape[1])


def test_only_the_neighbors_of_the_runs_own_images_stay_in_the_cache(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = load_pixels([world / "pictures"], SIZE, tmp_path)
    tokenizer, _ = load_tokenizer(world / "model" / "tokenizer")
    with ImageIndex.open(world / "model" / "index") as index:
        expected = prepare(pixels, index, tokenizer, 3, tmp_path / "every-pair").neighbors
        monkeypatch.setattr(neighbors, "EVERY_PAIR", 5)
        made = prepare(pixels, index, tokenizer, 3, tmp_path / "at-once").neighbors
    np.testing.assert_array_equal(made, expected)
    kept = (sorted(path.name for path in (tmp_path / one).iterdir()) for one in ("at-once", "every-pair"))
    assert next(kept) == next(kept)


def test_an_index_that_is_changed_while_neighbors_are_looked_up_is_told_and_nothing_is_kept(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = load_pixels([world / "pictures"], SIZE, tmp_path)
    tokenizer, _ = load_tokenizer(world / "model" / "tokenizer")
    with ImageIndex.open(world / "model" / "index", read_only=True) as index:
        expected = prepare(pixels, index, tokenizer, 3, tmp_path / "before").neighbors
        real, first = ImageIndex.neighbor_rows, index.ids[0]

        def removing(self: ImageIndex, *given: Any, **options: Any) -> np.ndarray:
            found = real(self, *given, **options)
            index.remove([first])
            return found

        monkeypatch.setattr(ImageIndex, "neighbor_rows", removing)
        with pytest.raises(
            UsageError, match="expected an index that nobody changes while neighbors are looked up, .*: give"
        ):
            prepare(pixels, index, tokenizer, 3, tmp_path / "cache")
    monkeypatch.undo()
    with ImageIndex.open(world / "model" / "index", read_only=True) as index:
        np.testing.assert_array_equal(prepare(pixels, index, tokenizer, 3, tmp_path / "cache").neighbors, expected)


def test_an_index_with_too_few_neighbors_says_how_many_would_do(world: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"more than 12 images, got 12: .*--set conditioning\.k=11"):
        train(world, tmp_path / "run", k=12)


def test_a_run_does_not_go_on_with_another_tokenizer_or_encoder(world: Path, tmp_path: Path) -> None:
    train(world, tmp_path / "run")
    with pytest.raises(UsageError, match="was trained with the tokenizer .* go on with that tokenizer"):
        train(world, tmp_path / "run", tokenizer="other", num_steps=2)
    with pytest.raises(UsageError, match="was trained with the encoder .* go on with that encoder"):
        train(world, tmp_path / "run", index="other", num_steps=2)
    train(world, tmp_path / "run", num_steps=2)


def test_a_second_run_is_refused_before_anything_is_prepared(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    monkeypatch.setattr("knn_diffusion.training.denoiser.load_pixels", None)
    with pytest.raises(UsageError, match="already holds a run"):
        train(world, tmp_path)


def test_parts_of_an_attempt_that_never_trained_are_replaced(world: Path, tmp_path: Path) -> None:
    stale = tmp_path / "run" / "model" / "tokenizer"
    stale.mkdir(parents=True)
    (stale / "config.json").write_text("{}")  # as an interrupted copy leaves it
    train(world, tmp_path / "run")
    assert load_model(tmp_path / "run" / "model").tokenizer.config.image_size == SIZE


def test_going_on_from_a_model_of_another_shape_names_the_difference(world: Path, tmp_path: Path) -> None:
    run = tiny_run(world)
    options = RunOptions(output=tmp_path / "run", device="cpu")
    wider = replace(run, denoiser=replace(run.denoiser, width=32))
    with (
        ImageIndex.open(world / "model" / "index") as index,
        pytest.raises(ConfigError, match="got width 32 for 16: leave out --preset"),
    ):
        train_denoiser(wider, [world / "pictures"], index, options, init=world / "model")


def test_a_model_that_goes_on_from_another_draws_as_that_one_did(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "model", tmp_path / "start")
    sampler = SamplerConfig(num_steps=2, order="confidence", guidance_scale=2.5)
    write_pipeline_file(tmp_path / "start", name="start", sampler=sampler, k=3, query_weight=0.5)
    with ImageIndex.open(world / "model" / "index") as index:
        options = RunOptions(output=tmp_path / "run", device="cpu")
        train_denoiser(tiny_run(world), [world / "pictures"], index, options, init=tmp_path / "start")
    made = load_model(tmp_path / "run" / "model")
    assert (made.sampler, made.k, made.query_weight) == (sampler, 3, 0.5)
