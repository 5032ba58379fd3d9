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
from tiny_world import GRID, GRIDS, SIZE, build_model, draw_pictures

from knn_diffusion import ImageIndex, KnnDiffusion
from knn_diffusion.config import from_dict
from knn_diffusion.diffusion.plan import SamplerConfig
from knn_diffusion.errors import ConfigError, UsageError
from knn_diffusion.image_index import FrozenIndex
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
QUIET = RunOptions(output=Path("nowhere"))


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
        data = prepare(made, index.frozen(), 3, tmp_path, QUIET)
        own = index.frozen().places_of(made.contents)
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
        known = index.frozen().places_of(expected.contents)
        index.remove([index.ids[known[4]], index.ids[known[7]]])
        made = examples(world, index, tmp_path / "tokens")
        np.testing.assert_array_equal(made.contents, expected.contents)
        every = np.arange(12)
        np.testing.assert_array_equal(made[every]["tokens"], expected[every]["tokens"])
        np.testing.assert_allclose(made[every]["embedding"], expected[every]["embedding"], atol=1e-3)
        data = prepare(made, index.frozen(), 3, tmp_path, QUIET)
        assert (index.frozen().places_of(made.contents) == -1).nonzero()[0].tolist() == [4, 7]
        own = made[np.array([4])]["embedding"].astype(np.float32)
        np.testing.assert_array_equal(data.neighbors[4:5], index.frozen().neighbor_places(own, 3))


def test_lists_of_a_large_index_are_made_at_once_and_only_those_of_the_run_stay(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ImageIndex.open(world / "model" / "index", read_only=True) as index:
        made = examples(world, index, tmp_path / "tokens")
        expected = prepare(made, index.frozen(), 3, tmp_path / "every-pair", QUIET).neighbors
        asked: list[int] = []
        real = FrozenIndex.neighbor_places
        monkeypatch.setattr(neighbors, "EVERY_PAIR", 5)
        monkeypatch.setattr(FrozenIndex, "neighbor_places", lambda *given: asked.append(len(given[1])) or real(*given))
        np.testing.assert_array_equal(prepare(made, index.frozen(), 3, tmp_path / "at-once", QUIET).neighbors, expected)
        assert asked == []
        kept = (sorted(path.name for path in (tmp_path / one).iterdir()) for one in ("at-once", "every-pair"))
        assert next(kept) == next(kept)
        index.remove([index.ids[index.frozen().places_of(made.contents)[2]]])
        prepare(made, index.frozen(), 3, tmp_path / "one-alone", QUIET)
        assert asked == [1]
        monkeypatch.setattr(neighbors, "FEW", 1)
        prepare(made, index.frozen(), 2, tmp_path / "one-alone", QUIET)
        assert asked == [1, 1]
        one = np.arange(12) == 3
        find_neighbors(made, np.flatnonzero(one), index.frozen(), 3, QUIET, tmp_path)
        assert asked == [1, 1, 1]


def test_neighbors_are_those_of_one_moment_whatever_becomes_of_the_index(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(world / "model", tmp_path / "model")
    with ImageIndex.open(tmp_path / "model" / "index") as index:
        made = examples(world, index, tmp_path / "tokens")
        expected = prepare(made, index.frozen(), 3, tmp_path / "before", QUIET)
        real = FrozenIndex.neighbor_places

        def changing(self: FrozenIndex, *given: Any, **options: Any) -> np.ndarray:
            if len(index) == 12:
                index.remove(index.ids[:2])
                index.compact()
            return real(self, *given, **options)

        monkeypatch.setattr(FrozenIndex, "neighbor_places", changing)
        found = prepare(made, index.frozen(), 3, tmp_path / "cache", QUIET)
        assert len(index) == 10
        np.testing.assert_array_equal(found.neighbors, expected.neighbors)
        batch, before = (one.batch(torch.arange(12), torch.Generator()) for one in (found, expected))
        assert all(torch.equal(batch[name], before[name]) for name in batch)


def test_lists_of_the_whole_index_are_not_made_twice(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbors, "EVERY_PAIR", 5)
    calls: list[int] = []
    real = FrozenIndex.self_neighbors
    monkeypatch.setattr(FrozenIndex, "self_neighbors", lambda *given, **more: calls.append(1) or real(*given, **more))
    with ImageIndex.open(world / "model" / "index", read_only=True) as index:
        made = examples(world, index, tmp_path / "tokens")
        index.remove([index.ids[3]])

        def interrupt(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(FrozenIndex, "neighbor_places", interrupt)
            with pytest.raises(KeyboardInterrupt):
                prepare(made, index.frozen(), 3, tmp_path, QUIET)
        prepare(made, index.frozen(), 3, tmp_path, QUIET)
    assert calls == [1]
    assert not list(tmp_path.glob("neighbors-of*"))


def test_many_comparisons_are_told_of(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "MANY_PAIRS", 100)
    said: list[str] = []
    with ImageIndex.open(world / "model" / "index", read_only=True) as index:
        made = examples(world, index, tmp_path / "tokens")
        prepare(made, index.frozen(), 3, tmp_path, RunOptions(output=tmp_path, notice=said.append))
    assert said[0].startswith("12 of the 12 images are compared with all 12 of the index, as it does not have them")


def test_a_picture_in_several_files_counts_once(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_FILES", 5)
    shutil.copytree(world / "pictures", tmp_path / "pictures")
    shutil.copy(tmp_path / "pictures" / "red-bar.png", tmp_path / "pictures" / "zebra.png")
    with ImageIndex.open(world / "model" / "index") as index:
        parts, _ = load_tokenizer(world / "model" / "tokenizer")
        options = RunOptions(output=tmp_path / "run")
        made = examples_of([tmp_path / "pictures"], index, parts, tmp_path / "tokens", Processes(device=CPU), options)
        data = prepare(made, index.frozen(), 3, tmp_path, QUIET)
    assert len(made) == 13
    assert len(data) == 12
    assert len(np.unique(made.contents[data.items], axis=0)) == 12


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


def test_a_denoiser_of_grids_trains_by_muon_previews_and_goes_on_exactly(world: Path, tmp_path: Path) -> None:
    run = tiny_run(world)
    settings = {
        "candidates": 4,
        "neighbor_dropout": 0.2,
        "skip_nearest": 0.3,
        "shuffle_leader": 0.3,
        "style_leader": 0.3,
        "grid_dropout": 0.2,
        "grid_shift": 1,
    }
    training = {"optimizer": "muon", "final_learning_rate": 1e-3, "validate_every": 2, "checkpoint_every": 2}
    run = replace(
        run,
        denoiser=replace(run.denoiser, **GRIDS),
        conditioning=replace(run.conditioning, k=3, **settings),
        training=replace(run.training, **training),
    )

    def reach(num_steps: int, output: Path, *, resume: bool = False) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)  # the weights that a run begins with
        whole = replace(run, training=replace(run.training, num_steps=num_steps))
        options = RunOptions(output=output, resume=resume, device="cpu")
        with ImageIndex.open(world / "model" / "index", read_only=True) as index:
            train_denoiser(whole, [world / "pictures"], index, options, tokenizer=world / "model" / "tokenizer")
        return load_model(output / "model").denoiser.state_dict()

    never_stopped = reach(4, tmp_path / "whole")
    before = reach(2, tmp_path / "parts")
    resumed = reach(4, tmp_path / "parts", resume=True)
    assert all(torch.equal(never_stopped[name], resumed[name]) for name in never_stopped)
    name = "blocks.0.mlp_in.weight"  # which Muon moves
    assert not torch.equal(before[name], resumed[name])
    assert len(list((tmp_path / "parts" / "previews").iterdir())) == 2


def test_fewer_neighbors_than_grids_are_refused(world: Path) -> None:
    run = tiny_run(world)
    with pytest.raises(ConfigError, match="conditioning.k must be at least grid_neighbors, 3, got 2"):
        replace(run, denoiser=replace(run.denoiser, **GRIDS))


@pytest.mark.parametrize("start", [None, 3, 0])
@pytest.mark.parametrize("k", [0, 2])
def test_a_model_draws_with_neighbors_if_and_only_if_it_was_trained_with_them(
    world: Path, tmp_path: Path, k: int, start: int | None
) -> None:
    init = None
    if start is not None:
        init = Path(shutil.copytree(world / "model", tmp_path / "start"))
        write_pipeline_file(init, name="start", sampler=SamplerConfig(num_steps=2), k=start)
    options = RunOptions(output=tmp_path / "run", device="cpu")
    with ImageIndex.open(world / "model" / "index") as index:
        train_denoiser(
            tiny_run(world, k=k),
            [world / "pictures"],
            index,
            options,
            tokenizer=world / "model" / "tokenizer",
            init=init,
        )
        pipe = KnnDiffusion.from_pretrained(tmp_path / "run" / "model", index=index, device="cpu")
        drawn = pipe("a red heart", num_inference_steps=1)
    expected = 0 if k == 0 else start or k
    assert (load_model(tmp_path / "run" / "model").k, drawn.k, len(drawn.neighbors)) == (expected,) * 3
