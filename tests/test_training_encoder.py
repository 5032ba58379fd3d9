"""The joint encoder's training: views of pictures, pairs and pools of captions, losses, and a tiny run from a folder."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tiny_encoder import tiny_sentences, tiny_sticker_config

from knn_diffusion.errors import CheckpointError, ConfigError, UsageError
from knn_diffusion.models.efficientnet import EfficientNet, save_backbone
from knn_diffusion.models.encoders import load_encoder, save_encoder
from knn_diffusion.models.sticker_encoder import StickerEncoder, StickerJointEncoder
from knn_diffusion.models.text_tower import save_text_tower
from knn_diffusion.training.captioned_pictures import CaptionedPictures, captioned_pictures, trained_rows
from knn_diffusion.training.captions import caption_table, read_captioned
from knn_diffusion.training.encoder import (
    ContrastConfig,
    EncoderRun,
    center_texts,
    chosen_loss,
    first_network,
    pairs_loss,
    train_encoder,
)
from knn_diffusion.training.encoder_validation import EncoderValidation, validation_of
from knn_diffusion.training.options import RunOptions
from knn_diffusion.training.plan import TrainingConfig
from knn_diffusion.training.views import ViewConfig, views

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 60, 220), "yellow": (230, 210, 40)}
SHAPES = ("dog", "cat", "heart", "apple")
STILL = ViewConfig(shrink=1.0, enlarge=0.0, turn=0.0, stretch=0.0, light=0.0, faded=0.0, own_ground=1.0)


def drawn(shape: str, colour: tuple[int, int, int], family: str) -> Image.Image:
    """A transparent picture: four shapes, filled by one family and only outlined by the other."""
    image = Image.new("RGBA", (32, 32))
    draw = ImageDraw.Draw(image)
    how = {"fill": colour} if family == "solid" else {"outline": colour, "width": 5}
    corners = {
        "dog": [(2, 2), (29, 29)],
        "cat": [(2, 2), (29, 12)],
        "heart": [(2, 29), (15, 2), (29, 29)],
        "apple": [(2, 2), (29, 29)],
    }[shape]
    {"dog": draw.rectangle, "cat": draw.rectangle, "heart": draw.polygon, "apple": draw.ellipse}[shape](corners, **how)  # type: ignore[operator]
    return image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pictures")
    lines = []
    for shape, (name, colour), family in itertools.product(SHAPES, COLOURS.items(), ("solid", "outlined")):
        file = f"{name}-{shape}-{family}.png"
        drawn(shape, colour, family).save(place / file)
        claims = [[f"tint:{name}:{shape}"], [f"shows:{shape}"]]
        entry = {"file": file, "captions": [f"{name} {shape}", shape], "family": family}
        lines.append(json.dumps(entry | {"facts": [one[0] for one in claims], "caption_facts": claims}))
    (place / "captions.jsonl").write_text("\n".join(lines))
    return place


@pytest.fixture(scope="module")
def pictures(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> CaptionedPictures:
    cache = tmp_path_factory.mktemp("cache")
    return captioned_pictures(
        read_captioned([folder]), tiny_sentences(), cache, size=16, ground=191, pool=12, view=ViewConfig()
    )


def tiny_run(num_steps: int = 60) -> EncoderRun:
    training = TrainingConfig(
        num_steps=num_steps, batch_size=8, learning_rate=3e-3, warmup_steps=5, validate_every=num_steps,
        checkpoint_every=num_steps, precision="float32", ema_decay=0.9,
    )  # fmt: skip
    return EncoderRun(encoder=tiny_sticker_config(), losses=ContrastConfig(pool=12), training=training)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def viewed(
    picture: np.ndarray, cfg: ViewConfig, count: int = 40, *, mirror: bool = False, fade: bool = False
) -> np.ndarray:
    """Many views of one picture, levels 0 … 255."""
    made = views(
        np.repeat(picture[None], count, 0), 16, 191, cfg, seeded(),
        may_mirror=np.full(count, mirror), may_fade=np.full(count, fade),
    )  # fmt: skip
    return ((made + 1) * 127.5).permute(0, 2, 3, 1).numpy()


def test_a_still_view_is_the_picture_on_the_encoders_ground() -> None:
    picture = np.zeros((16, 16, 4), np.uint8)
    picture[4:12, 2:10] = (200, 100, 0, 255)
    seen = viewed(picture, STILL, 3)
    expected = np.where(picture[..., 3:] > 0, picture[..., :3], 191)
    assert np.abs(seen - expected).max() < 0.01


def test_half_transparent_colours_are_mixed_with_the_ground() -> None:
    picture = np.full((16, 16, 4), (255, 0, 0, 128), np.uint8)
    share = 128 / 255
    expected = np.array([255, 0, 0]) * share + 191 * (1 - share)
    assert np.abs(viewed(picture, STILL, 1)[0] - expected).max() < 0.01


def test_only_pictures_that_may_be_mirrored_are() -> None:
    picture = np.zeros((16, 16, 4), np.uint8)
    picture[:, :6] = (0, 0, 0, 255)
    left = viewed(picture, STILL)[..., :6, 0].mean((1, 2)) < 1
    assert left.all()
    mirrored = viewed(picture, STILL, mirror=True)[..., :6, 0].mean((1, 2)) > 1
    assert 8 < mirrored.sum() < 32


def test_only_pictures_that_may_lose_their_colours_do() -> None:
    picture = np.full((16, 16, 4), (220, 30, 30, 255), np.uint8)
    fading = replace(STILL, faded=1.0)
    assert np.ptp(viewed(picture, fading, fade=True), axis=-1).max() < 0.01
    assert np.ptp(viewed(picture, fading), axis=-1).min() > 100


def test_a_shrunk_opaque_picture_is_filled_with_its_edge_and_a_transparent_one_with_the_ground() -> None:
    opaque = np.full((16, 16, 4), (220, 30, 30, 255), np.uint8)
    shrunk = replace(STILL, shrink=2.0, turn=20.0)
    assert np.abs(viewed(opaque, shrunk) - (220, 30, 30)).max() < 0.1
    holed = opaque.copy()
    holed[8, 8, 3] = 0
    assert (np.abs(viewed(holed, shrunk)[:, 0, 0] - 191).max(-1) < 60).any()


def test_grounds_are_the_own_white_and_any_colour() -> None:
    nothing = np.zeros((16, 16, 4), np.uint8)
    corners = viewed(nothing, replace(STILL, own_ground=0.5), 400)[:, 0, 0]
    own, white = (np.abs(corners - level).max(-1) < 0.1 for level in (191, 255))
    assert 0.4 < own.mean() < 0.6
    assert 0.15 < white.mean() < 0.35
    assert len(np.unique(corners[~own & ~white].round(), axis=0)) > 50


def test_a_batch_pairs_what_shows_the_same_across_families(pictures: CaptionedPictures, folder: Path) -> None:
    batch = pictures.batch(torch.arange(5), seeded())
    assert batch["pixels"].shape == (10, 3, 16, 16)
    assert batch["sentences"].shape == (12, 16)
    assert bool(batch["same"].roll(5, 1).diagonal().all())
    found = read_captioned([folder])
    row = int(pictures.drawn[0])
    partner = pictures._partner(row, 0.5)
    assert found[partner].captions[0] == found[row].captions[0]
    assert found[partner].family != found[row].family or len(pictures.peers[pictures.table.groups[row]]) == 1


def test_each_pictures_caption_is_in_the_pool_and_true_of_it(pictures: CaptionedPictures) -> None:
    for seed in range(5):
        batch = pictures.batch(torch.arange(7), seeded(seed))
        assert bool(batch["true"][torch.arange(14), batch["own"]].all())


def test_a_batch_follows_from_its_generator(pictures: CaptionedPictures) -> None:
    first, again, other = (pictures.batch(torch.arange(9), seeded(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pixels"], other["pixels"])


def test_a_picture_without_partner_is_its_own_and_is_drawn_half_as_often(pictures: CaptionedPictures) -> None:
    lone = [row for row in pictures.trained if len(pictures.peers[pictures.table.groups[row]]) == 1]
    assert lone
    for row in pictures.trained:
        alone = row in lone
        assert (pictures.drawn == row).sum() == (1 if alone else 2)
        assert (pictures._partner(int(row), 0.3) == row) == alone


def test_some_pictures_are_set_aside_but_never_the_last_of_its_kind(folder: Path) -> None:
    found = read_captioned([folder])
    table = caption_table(found)
    trained = trained_rows(found, table)
    assert 0 < len(found) - len(trained) <= 2
    assert set(table.groups[trained]) == set(table.groups)
    assert trained_rows(found[:1], caption_table(found[:1])).tolist() == [0]


def test_the_chosen_loss_leaves_out_what_is_true_too() -> None:
    logits = torch.tensor([[2.0, 1.0, 2.0], [0.0, 3.0, 0.0]])
    true = torch.tensor([[True, False, True], [False, True, False]])
    slow = [-np.log(np.exp(2) / (np.exp(2) + np.exp(1))), -np.log(np.exp(3) / (np.exp(3) + 2))]
    torch.testing.assert_close(chosen_loss(logits, torch.tensor([0, 1]), true), torch.tensor(np.mean(slow)).float())


def test_the_pairs_loss_wants_the_partner_among_pictures_that_show_something_else() -> None:
    vectors = torch.eye(3)[[0, 1, 0, 1]]  # pictures 0 and 2 are a pair, as are 1 and 3
    same = torch.tensor([[(i - j) % 2 == 0 for j in range(4)] for i in range(4)])
    assert pairs_loss(50 * vectors @ vectors.T, same) < 1e-6
    swapped = torch.eye(3)[[0, 1, 1, 0]]
    assert pairs_loss(50 * swapped @ swapped.T, same) > 10


def test_texts_are_centered_and_half_whitened_before_the_first_step() -> None:
    network = StickerEncoder(replace(tiny_sticker_config(), dim=4))
    mixing = torch.randn(16, 16, generator=seeded()) * torch.logspace(0, -2, 16)
    sentences = torch.randn(500, 16, generator=seeded(1)) @ mixing.T + 3
    center_texts(network, sentences)
    read = network.text_head(sentences - network.text_center)
    torch.testing.assert_close(read.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    spread = read.std(0)
    plain = torch.linalg.svdvals(sentences - sentences.mean(0))[:4]
    torch.testing.assert_close((spread / spread[0]) ** 2, plain / plain[0], rtol=0.02, atol=0)


def test_a_wide_space_leaves_the_coordinates_that_no_text_needs_at_zero() -> None:
    network = StickerEncoder(replace(tiny_sticker_config(), dim=24))
    center_texts(network, torch.randn(100, 16, generator=seeded()))
    assert not network.text_head.weight[16:].any()
    assert network.text_head.weight[:16].any(1).all()


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    place = tmp_path_factory.mktemp("run")
    save_text_tower(place / "text", tiny_sentences())
    seen: list[dict[str, float]] = []
    options = RunOptions(output=place / "out", device="cpu", watch=lambda step: seen.append(dict(step.metrics)))
    train_encoder(replace(tiny_run(), text_tower=str(place / "text")), [folder], options)
    return place, seen


def test_training_lowers_every_loss_and_leaves_an_encoder_that_loads(
    trained: tuple[Path, list[dict[str, float]]],
) -> None:
    place, seen = trained
    for name in ("encoder/named", "encoder/found", "encoder/families"):
        early, late = (np.mean([metrics[name] for metrics in part]) for part in (seen[:10], seen[-10:]))
        assert late < 0.9 * early, name
    assert 0 <= seen[-1]["validation/top1"] <= seen[-1]["validation/top5"] <= 1
    assert (place / "out" / "previews" / "step-0000060.png").is_file()
    loaded = load_encoder(place / "out" / "model")
    assert isinstance(loaded, StickerJointEncoder)
    assert loaded.facts["steps"] == 60
    assert loaded.facts["run"]["losses"]["pool"] == 12


def test_a_run_goes_on_in_slices_to_the_same_weights(
    folder: Path, trained: tuple[Path, list[dict[str, float]]]
) -> None:
    place, _ = trained
    run = replace(tiny_run(2), text_tower=str(place / "text"))
    whole = train_encoder(run, [folder], RunOptions(output=place / "whole", device="cpu"))
    options = RunOptions(output=place / "slices", device="cpu")
    first = train_encoder(run, [folder], replace(options, max_minutes=0.0))
    second = train_encoder(run, [folder], replace(options, resume=True))
    assert (first.step, first.finished, second.step, second.finished) == (1, False, 2, True)
    assert whole.finished
    weights = [(place / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "slices")]
    assert weights[0] == weights[1]


def test_a_run_does_not_go_on_with_other_captions(
    folder: Path, trained: tuple[Path, list[dict[str, float]]], tmp_path: Path
) -> None:
    place, _ = trained
    lines = (folder / "captions.jsonl").read_text().replace("red dog", "red cat").splitlines()
    entries = [json.loads(line) for line in lines]
    for entry in entries:
        entry["file"] = str(folder / entry["file"])
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, entries)))
    run = replace(tiny_run(), text_tower=str(place / "text"))
    with pytest.raises(UsageError, match="not the same: resume with the --images of before"):
        train_encoder(run, [tmp_path], RunOptions(output=place / "out", device="cpu", resume=True))


def test_the_first_weights_are_the_backbones_or_those_of_another_encoder(
    pictures: CaptionedPictures, tmp_path: Path
) -> None:
    run = tiny_run()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        backbone = EfficientNet(run.encoder.backbone)
    save_backbone(tmp_path / "backbone", backbone, {})
    network = first_network(replace(run, backbone=str(tmp_path / "backbone")), pictures, None)
    assert torch.equal(network.backbone.stem.weight, backbone.stem.weight)
    assert not torch.equal(first_network(run, pictures, None).backbone.stem.weight, backbone.stem.weight)
    save_encoder(StickerJointEncoder(network, tiny_sentences()), tmp_path / "model" / "encoder")
    (tmp_path / "model" / "pipeline.json").write_text("{}")
    for init in (tmp_path / "model", tmp_path / "model" / "encoder"):
        begun = first_network(run, pictures, init)
        assert torch.equal(begun.text_head.weight, network.text_head.weight.half().float())
    with pytest.raises(CheckpointError, match="of another size"):
        first_network(replace(run, encoder=replace(run.encoder, dim=9)), pictures, tmp_path / "model")


def test_the_same_seed_gives_the_same_first_weights(pictures: CaptionedPictures) -> None:
    def weights(seed: int) -> torch.Tensor:
        run = tiny_run()
        return first_network(replace(run, training=replace(run.training, seed=seed)), pictures, None).meaning.weight

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


class _Telling(StickerJointEncoder):
    """Places pictures and texts where the test says."""

    def __init__(self, pictures: np.ndarray, texts: np.ndarray) -> None:
        self._pictures, self._texts = pictures.astype(np.float32), texts.astype(np.float32)

    def encode_arrays(self, arrays: np.ndarray) -> np.ndarray:
        return self._pictures[: len(arrays)]

    def encode_texts(self, texts: object) -> np.ndarray:
        return self._texts


def test_the_validation_counts_captions_that_find_what_they_name_in_all_and_in_each_family() -> None:
    groups = np.array([0, 1, 0, 1])
    judged = EncoderValidation(
        pictures=np.zeros((4, 16, 16, 3), np.uint8),
        captions=["dog", "cat", "dog", "cat"],
        groups=groups,
        families=["a", "a", "b", "b"],
    )
    places = np.eye(2)[groups]
    perfect = judged.judge(_Telling(places, places))
    assert perfect == dict.fromkeys(("top1", "top5", "top1/a", "top5/a", "top1/b", "top5/b"), 1.0)
    confused = judged.judge(_Telling(places, places[[1, 0, 2, 3]]))
    assert (confused["top1"], confused["top1/a"], confused["top1/b"]) == (0.5, 0.0, 1.0)
    assert confused["top5"] == 1.0


def test_pictures_set_aside_are_validated_as_the_encoder_reads_them(pictures: CaptionedPictures, folder: Path) -> None:
    found = read_captioned([folder])
    judged = validation_of(pictures, found)
    rows = sorted(set(range(len(found))) - set(pictures.trained.tolist()))
    assert list(judged.captions) == [found[row].captions[0] for row in rows]
    assert judged.pictures.shape == (len(rows), 16, 16, 3)
    assert (judged.pictures[:, 0, 0] == 191).all()


def test_without_pictures_set_aside_there_is_nothing_to_judge() -> None:
    nothing = EncoderValidation(
        pictures=np.empty((0, 16, 16, 3), np.uint8), captions=[], groups=np.empty(0, int), families=[]
    )
    assert nothing.judge(_Telling(np.empty((0, 2)), np.empty((0, 2)))) == {}
    assert nothing.preview(_Telling(np.empty((0, 2)), np.empty((0, 2)))) is None


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (ContrastConfig, {"pool": 0}),
        (ContrastConfig, {"first_scale": 99.0}),
        (ViewConfig, {"shrink": 0.9}),
        (ViewConfig, {"faded": 2.0}),
    ],
)
def test_impossible_settings_are_refused(config: type, wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        config(**wrong)
