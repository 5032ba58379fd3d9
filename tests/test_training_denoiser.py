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
from tiny_world import GRID, SIZE, build_model, draw_pictures

from knn_diffusion import ImageIndex
from knn_diffusion.config import from_dict
from knn_diffusion.diffusion.plan import SamplerConfig
from knn_diffusion.errors import ConfigError, UsageError
from knn_diffusion.model_folder import load_model, write_pipeline_file
from knn_diffusion.models.tokenizers import load_tokenizer
from knn_diffusion.tokens import Examples, units
from knn_diffusion.training import neighbors
from knn_diffusion.training.denoiser import DenoiserRun, train_denoiser
from knn_diffusion.training.neighbors import ABSENT, find_neighbors, prepare
from knn_diffusion.training.options import RunOptions
from knn_diffusion.training.processes import Processes
from knn_diffusion.training.tokens import examples_of

CPU = torch.device("cpu")


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


def examples(world: Path, index: ImageIndex, place: Path, tokenizer: str = "model/tokenizer") -> Examples:
    """The pictures as a run makes them."""
    parts, _ = load_tokenizer(world / tokenizer)
    return examples_of([world / "pictures"], index, parts, place, Processes(device=CPU), RunOptions(output=place))


def test_no_image_is_its_own_neighbor(world: Path, tmp_path: Path) -> None:
    with ImageIndex.open(world / "model" / "index") as index:
        made = examples(world, index, tmp_path / "tokens")
        data = prepare(made, index, 3, tmp_path)
        own = index.places_of(made.contents)
        assert sorted(own.tolist()) == list(range(12))
        np.testing.assert_array_equal(made[np.arange(12)]["embedding"], index.embeddings[own])
    assert not (data.neighbors == own[:, None]).any()
    batch = data.batch(torch.tensor([0, 5]), torch.Generator())
    assert torch.equal(batch["present"], torch.from_numpy(data.neighbors[[0, 5]] != ABSENT))
    assert batch["neighbors"].shape == (2, 3, batch["query"].shape[1])
    assert batch["tokens"].shape == (2, GRID**2)


def test_images_that_the_index_does_not_have_are_embedded_and_find_its_images(world: Path, tmp_path: Path) -> None:
    with ImageIndex.open(world / "model" / "index", read_only=True) as index:
        expected = examples(world, index, tmp_path / "before")
        known = index.places_of(expected.contents)
        index.remove([index.ids[known[4]], index.ids[known[7]]])
        made = examples(world, index, tmp_path / "tokens")
        np.testing.assert_array_equal(made.contents, expected.contents)
        every = np.arange(12)
        np.testing.assert_array_equal(made[every]["tokens"], expected[every]["tokens"])
        np.testing.assert_allclose(made[every]["embedding"], expected[every]["embedding"], atol=1e-3)
        data = prepare(made, index, 3, tmp_path)
        assert (index.places_of(made.contents) == -1).nonzero()[0].tolist() == [4, 7]
        own = made[np.array([4])]["embedding"].astype(np.float32)
        np.testing.assert_array_equal(data.neighbors[4:5], index.neighbor_rows(own, 3))


def test_lists_of_a_large_index_are_made_at_once_and_only_those_of_the_run_stay(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ImageIndex.open(world / "model" / "index", read_only=True) as index:
        made = examples(world, index, tmp_path / "tokens")
        expected = prepare(made, index, 3, tmp_path / "every-pair").neighbors
        asked: list[int] = []
        real = ImageIndex.neighbor_rows
        monkeypatch.setattr(neighbors, "EVERY_PAIR", 5)
        monkeypatch.setattr(ImageIndex, "neighbor_rows", lambda *given: asked.append(len(given[1])) or real(*given))
        np.testing.assert_array_equal(prepare(made, index, 3, tmp_path / "at-once").neighbors, expected)
        assert asked == []
        kept = (sorted(path.name for path in (tmp_path / one).iterdir()) for one in ("at-once", "every-pair"))
        assert next(kept) == next(kept)
        index.remove([index.ids[index.places_of(made.contents)[2]]])
        prepare(made, index, 3, tmp_path / "one-alone")
        assert asked == [1]
        monkeypatch.setattr(neighbors, "FEW", 1)
        prepare(made, index, 2, tmp_path / "one-alone")
        assert asked == [1, 1]
        one = np.arange(12) == 3
        find_neighbors(made, np.flatnonzero(one), index, 3)
        assert asked == [1, 1, 1]


def test_an_index_that_is_changed_while_neighbors_are_looked_up_is_told_and_nothing_is_kept(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ImageIndex.open(world / "model" / "index", read_only=True) as index:
        made = examples(world, index, tmp_path / "tokens")
        expected = prepare(made, index, 3, tmp_path / "before").neighbors
        real, first = ImageIndex.neighbor_rows, index.ids[0]

        def removing(self: ImageIndex, *given: Any, **options: Any) -> np.ndarray:
            found = real(self, *given, **options)
            index.remove([first])
            return found

        monkeypatch.setattr(ImageIndex, "neighbor_rows", removing)
        with pytest.raises(
            UsageError, match="expected an index that nobody changes while neighbors are looked up, .*: give"
        ):
            prepare(made, index, 3, tmp_path / "cache")
    monkeypatch.undo()
    with ImageIndex.open(world / "model" / "index", read_only=True) as index:
        np.testing.assert_array_equal(prepare(made, index, 3, tmp_path / "cache").neighbors, expected)


def test_a_picture_in_several_files_counts_once(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_IMAGES", 5)
    shutil.copytree(world / "pictures", tmp_path / "pictures")
    shutil.copy(tmp_path / "pictures" / "red-bar.png", tmp_path / "pictures" / "zebra.png")
    with ImageIndex.open(world / "model" / "index") as index:
        parts, _ = load_tokenizer(world / "model" / "tokenizer")
        options = RunOptions(output=tmp_path / "run")
        made = examples_of([tmp_path / "pictures"], index, parts, tmp_path / "tokens", Processes(device=CPU), options)
        data = prepare(made, index, 3, tmp_path)
    assert len(made) == 13
    assert data.items.tolist() == list(range(12))


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
    monkeypatch.setattr("knn_diffusion.training.denoiser.examples_of", None)
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
