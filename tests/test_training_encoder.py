"""The encoder's data, its losses on a tiny world, and the figures it is judged by."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_encoder import tiny_config, tiny_encoder, tiny_sentences

from knn_diffusion import stickers
from knn_diffusion.errors import ConfigError, UsageError
from knn_diffusion.models.encoders import SmallJointEncoder, load_encoder
from knn_diffusion.models.small_encoder import SmallEncoder, SmallEncoderConfig
from knn_diffusion.models.text_tower import save_text_tower
from knn_diffusion.training.captioned import CaptionedImages, folder_pairs, holds, sticker_pairs, told_facts
from knn_diffusion.training.closed_form import fitted
from knn_diffusion.training.encoder import (
    EncoderLossConfig,
    EncoderObjective,
    EncoderRun,
    train_encoder,
)
from knn_diffusion.training.encoder_benchmark import EncoderBenchmark, looks_probe, sticker_benchmark
from knn_diffusion.training.loop import train
from knn_diffusion.training.options import RunOptions
from knn_diffusion.training.plan import TrainingConfig

GLYPHS = stickers.FolderGlyphs(Path(__file__).parent / "fixtures" / "glyphs")


def tiny_run(seed: int = 0) -> EncoderRun:
    training = TrainingConfig(
        num_steps=40, batch_size=16, learning_rate=5e-3, warmup_steps=5, validate_every=40, checkpoint_every=40,
        precision="float32", seed=seed,
    )  # fmt: skip
    return EncoderRun(encoder=tiny_config(), losses=EncoderLossConfig(thumbnail=8), training=training)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> CaptionedImages:
    return sticker_pairs(
        tiny_sentences(max_tokens=100),
        tmp_path_factory.mktemp("cache"),
        count=40,
        size=16,
        captions_each=2,
        glyphs=GLYPHS,
    )


@pytest.fixture(scope="module")
def benchmark() -> EncoderBenchmark:
    return sticker_benchmark(16, GLYPHS, probe_count=40)


def thing(name: str, tint: str | None = None, turned: int = 0) -> stickers.Thing:
    return stickers.Thing(char="x", name=name, tint=tint, turned=turned)


def test_a_caption_tells_what_it_names() -> None:
    scene = stickers.Scene(0, "dotted", "blue", (thing("dog", "teal"), thing("cat")), "left of")
    everything = told_facts(scene, stickers.caption(scene))
    assert ("ground", "blue") in everything
    assert ("pattern", "dotted") in everything
    assert ("tint", "teal", "dog") in everything
    assert ("relation", "left of") in everything
    assert told_facts(scene, "dog and cat") == [("thing", "dog"), ("thing", "cat")]


def test_a_background_is_not_told_by_a_thing_of_that_colour() -> None:
    scene = stickers.Scene(0, "plain", "blue", (thing("blue heart"),))
    assert told_facts(scene, "a blue heart") == [("thing", "blue heart")]
    assert ("ground", "blue") in told_facts(scene, "a blue heart on blue")


def test_a_caption_holds_for_a_picture_that_has_all_it_tells() -> None:
    facts = np.array([[1, 2, 3], [1, 2, -1]])
    told = np.array([[1, -1], [1, 3], [2, 4]])
    assert holds(facts, told).tolist() == [[True, True, False], [True, False, False]]


def test_the_first_caption_of_a_scene_is_its_bare_names(pairs: CaptionedImages) -> None:
    scene = stickers.sample_scenes(40, 0, "all", GLYPHS)[7]
    expected = tiny_sentences(max_tokens=100).encode([" and ".join(thing.name for thing in scene.things)])
    np.testing.assert_allclose(pairs.sentences[pairs.caption_rows[7, 0]], expected[0], atol=2e-2)


def test_every_caption_holds_for_its_own_picture(pairs: CaptionedImages) -> None:
    batch = pairs.batch(torch.arange(40), torch.Generator().manual_seed(0))
    assert bool(batch["also_true"].diagonal().all())
    assert batch["pixels"].shape == (40, 3, 16, 16)
    assert batch["sentences"].shape == (40, 16)


def test_a_batch_follows_from_its_generator(pairs: CaptionedImages) -> None:
    first, again, other = (pairs.batch(torch.arange(9), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pixels"], other["pixels"])


def test_pictures_that_say_left_or_right_are_never_mirrored(pairs: CaptionedImages) -> None:
    scenes = stickers.sample_scenes(40, 0, "all", GLYPHS)
    sided = [scene.relation in ("left of", "right of") for scene in scenes]
    assert any(sided)
    assert (pairs.may_mirror == ~np.array(sided)).all()


def test_training_lowers_both_losses_and_leaves_an_encoder_that_loads(
    pairs: CaptionedImages, benchmark: EncoderBenchmark, tmp_path: Path
) -> None:
    objective = EncoderObjective(tiny_run(), tiny_sentences(max_tokens=100), benchmark)
    seen: list[dict[str, float]] = []
    options = RunOptions(output=tmp_path, device="cpu", watch=lambda step: seen.append(dict(step.metrics)))
    train(objective, pairs, tiny_run().training, options)
    for name in ("encoder/contrast", "encoder/looks"):
        early, late = (np.mean([metrics[name] for metrics in part]) for part in (seen[:10], seen[-10:]))
        assert late < 0.9 * early
    assert 0 <= seen[-1]["validation/name_top1"] <= seen[-1]["validation/name_top5"] <= 1
    assert (tmp_path / "previews" / "step-0000040.png").is_file()
    loaded = load_encoder(tmp_path / "model")
    assert isinstance(loaded, SmallJointEncoder)
    assert loaded.name == "stickers"
    assert loaded.facts["steps"] == 40


def test_a_fitted_head_keeps_the_tower_and_puts_captions_where_their_pictures_lie(pairs: CaptionedImages) -> None:
    encoder = SmallJointEncoder(tiny_encoder().network, tiny_sentences(max_tokens=100))
    made = SmallJointEncoder(fitted(encoder.network, pairs), encoder.sentences)
    vectors = made.encode_arrays(np.asarray(pairs.pixels))
    np.testing.assert_array_equal(vectors, encoder.encode_arrays(np.asarray(pairs.pixels)))
    sentences = torch.from_numpy(pairs.sentences[pairs.caption_rows[:, 0]].astype(np.float32))

    def agreement(network: SmallEncoder) -> float:
        with torch.no_grad():
            texts = network.embed_texts(sentences).numpy()
        center = vectors.mean(0)
        return float(((vectors - center) * (texts - center)).sum(1).mean())

    assert made.network.config.anchors > 3
    assert agreement(made.network) > 2 * max(agreement(encoder.network), 0.001)
    again = fitted(made.network, pairs)
    assert torch.equal(again.text_head.weight, made.network.text_head.weight)


def test_a_remembered_caption_lies_at_the_mean_of_its_pictures(pairs: CaptionedImages) -> None:
    made = fitted(tiny_encoder().network, pairs)
    assert made.memory is not None
    plain = pairs.caption_rows[:, 0]
    row = int(np.bincount(plain).argmax())
    places = tiny_encoder().encode_arrays(np.asarray(pairs.pixels))
    expected = places[plain == row].mean(0) - places.mean(0)
    compared = made.memory.compared(torch.from_numpy(pairs.sentences[row : row + 1].astype(np.float32)))
    slot = int((made.memory.keys @ compared[0]).argmax())
    np.testing.assert_allclose(made.memory.places[slot].numpy(), expected, atol=2e-2)


@pytest.mark.parametrize("looks", [0, 5])
def test_captions_that_no_two_pictures_share_leave_the_head_as_it_was(pairs: CaptionedImages, looks: int) -> None:
    rows = np.arange(len(pairs) * 2, dtype=np.int32).reshape(-1, 2)
    network = tiny_encoder().network
    made = fitted(network, replace(pairs, caption_rows=rows), looks)
    sentences = torch.from_numpy(pairs.sentences[:9].astype(np.float32))
    with torch.no_grad():
        texts, before = made.embed_texts(sentences), network.embed_texts(sentences)
    torch.testing.assert_close(texts[:, : network.config.dim], before)
    assert not texts[:, network.config.dim :].any()


def test_looks_are_the_principal_components_of_the_thumbnails(pairs: CaptionedImages) -> None:
    network, pixels = tiny_encoder().network, np.asarray(pairs.pixels)
    made = SmallJointEncoder(fitted(network, pairs, looks=7), tiny_sentences(max_tokens=100))
    meaning = network.config.dim
    assert made.dim == meaning + 7
    vectors = made.encode_arrays(pixels)
    np.testing.assert_allclose(np.linalg.norm(vectors[:, meaning:], axis=1), 0.5**0.5, atol=1e-5)
    alone = SmallJointEncoder(network, made.sentences).encode_arrays(pixels)
    np.testing.assert_allclose(vectors[:, :meaning], alone * 0.5**0.5, atol=1e-6)

    step = pixels.shape[1] // network.config.looks_side
    blocks = pixels.reshape(len(pixels), -1, step, pixels.shape[2] // step, step, 3) / 127.5 - 1
    small = blocks.mean((2, 4)).transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    centered = small - small.mean(0)
    _, sizes, rows = np.linalg.svd(centered, full_matrices=False)
    variances = sizes**2 / len(pixels)
    expected = centered @ rows[:7].T / np.sqrt(variances[:7] + 1e-4 * variances.sum())
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = vectors[:, meaning:] / 0.5**0.5
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=2e-3)  # a component's sign is free


def test_looks_that_could_not_be_fitted_are_refused_before_anything_is_trained() -> None:
    with pytest.raises(ConfigError, match="looks must be from 0 to 768, got 1000"):
        replace(EncoderRun(), looks=1000)
    with pytest.raises(ConfigError, match=r"encoder\.looks must be 0, they are fitted afterwards"):
        replace(EncoderRun(), encoder=SmallEncoderConfig(looks=8))


def test_looks_can_be_fitted_again_and_taken_away(pairs: CaptionedImages) -> None:
    made = fitted(tiny_encoder().network, pairs, looks=7)
    assert torch.equal(fitted(made, pairs, looks=7).text_head.weight, made.text_head.weight)
    assert torch.equal(fitted(made, pairs).text_head.weight, fitted(tiny_encoder().network, pairs).text_head.weight)


def test_the_same_seed_gives_the_same_first_weights(benchmark: EncoderBenchmark) -> None:
    def weights(seed: int) -> torch.Tensor:
        made = EncoderObjective(tiny_run(seed), tiny_sentences(max_tokens=100), benchmark)
        return made.small.image_tower.head.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_the_probe_reads_looks_where_they_are_and_nothing_from_noise() -> None:
    rng = np.random.default_rng(0)
    pixels = np.repeat(np.repeat(rng.integers(0, 256, (800, 2, 2, 3), np.uint8), 8, 1), 8, 2)
    told = pixels[:, ::8, ::8].reshape(800, -1).astype(np.float32)
    assert looks_probe(told / np.linalg.norm(told, axis=1, keepdims=True), pixels)["looks_r2_new"] > 0.8
    assert looks_probe(rng.normal(size=(800, 12)).astype(np.float32), pixels)["looks_r2"] < 0.1


def test_the_benchmark_shows_each_concept_once_and_the_probes_halves_share_none(benchmark: EncoderBenchmark) -> None:
    assert len(benchmark.gallery) == len(benchmark.names) == len(set(benchmark.names))
    assert len(benchmark.probe) == 40


def captioned_folder(folder: Path) -> Path:
    folder.mkdir()
    lines = []
    for number, caption in enumerate(["a red dog", "cat", "cat", "a blue heart"]):
        Image.new("RGB", (20, 24), (50 * number, 90, 200)).save(folder / f"{number}.png")
        lines.append(json.dumps({"file": f"{number}.png", "caption": caption}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_a_folder_with_captions_trains_an_encoder_in_resumable_slices(tmp_path: Path) -> None:
    folder = captioned_folder(tmp_path / "pictures")
    save_text_tower(tmp_path / "text", tiny_sentences(max_tokens=100))
    training = replace(tiny_run().training, num_steps=2, batch_size=4)
    run = replace(tiny_run(), training=training, text_tower=str(tmp_path / "text"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "knn_diffusion.training.encoder.sticker_benchmark", lambda size: sticker_benchmark(size, GLYPHS, 40)
        )
        options = RunOptions(output=tmp_path / "out", device="cpu")
        first = train_encoder(run, [folder], replace(options, max_minutes=0.0))
        second = train_encoder(run, [folder], replace(options, resume=True))
    assert (first.step, first.finished, second.step, second.finished) == (1, False, 2, True)
    assert {"fitted/name_top1", "validation/name_top1"} <= set(second.metrics)
    assert load_encoder(tmp_path / "out" / "model").facts["run"]["scenes"] == 24_000  # type: ignore[attr-defined]


def test_the_same_caption_is_also_true_of_its_other_pictures(tmp_path: Path) -> None:
    folder = captioned_folder(tmp_path / "pictures")
    made = folder_pairs([folder], tiny_sentences(), tmp_path / "cache", size=16, report=None)
    batch = made.batch(torch.arange(4), torch.Generator().manual_seed(0))
    assert batch["also_true"].tolist()[1] == [False, True, True, False]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "expected a folder with captions.jsonl"), ("", "has none"), ('{"file": "a.png"}\n', "in line 1 of")],
)
def test_a_folder_without_usable_captions_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "captions.jsonl").write_text(content)
    with pytest.raises(UsageError, match=message):
        folder_pairs([tmp_path], tiny_sentences(), tmp_path / "cache", size=16, report=None)


def test_a_run_whose_thumbnail_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"losses.thumbnail must be a divisor of encoder.size 64"):
        EncoderRun(losses=EncoderLossConfig(thumbnail=24))
