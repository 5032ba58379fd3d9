"""`evaluate images`: two sets of pictures in, eight figures out, and every wrong input a line with a cure."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from knn_diffusion.cli import main
from knn_diffusion.errors import UsageError
from knn_diffusion.evaluation import features, sides
from knn_diffusion.evaluation.comparison import ComparisonConfig, compare
from knn_diffusion.models.efficientnet import EfficientNet, EfficientNetConfig, Stage, save_backbone

NAMES = ("FD", "FD∞", "KID", "CMMD", "precision", "recall", "density", "coverage")
FEW = ComparisonConfig(resamples=10)


class MeanColour:
    """Sees the mean of each channel, and of the upper half."""

    name, digest, width = "mean colour", "0123456789abcdef", 6

    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        rows = []
        for image in images:
            assert image.mode == "RGB"
            levels = np.asarray(image, np.float32)
            rows.append(np.concatenate([levels.mean((0, 1)), levels[: len(levels) // 2].mean((0, 1))]))
        return np.stack(rows)


def pictures(folder: Path, count: int, seed: int, *, size: int = 16, kind: str = "png", shift: int = 0) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(count):
        colours = rng.integers(30, 200, (2, 3)) + shift
        levels = np.repeat(colours.astype(np.uint8), size // 2, axis=0)[:, None].repeat(size, 1)
        Image.fromarray(levels).save(folder / f"{number:03}.{kind}")
    return folder


def notices(drawn: Path, reference: Path) -> str:
    return " ".join(compare(drawn, reference, MeanColour(), settings=FEW).sections[0].details["notices"])


def error(*arguments: str | Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["evaluate", "images", *map(str, arguments)]) == 2
    return capsys.readouterr().err.strip()


def test_equal_distributions_are_near_and_shifted_ones_far(tmp_path: Path) -> None:
    real, other = pictures(tmp_path / "real", 60, 0), pictures(tmp_path / "other", 60, 1)
    shifted = pictures(tmp_path / "shifted", 60, 1, shift=50)
    near, far = (compare(side, real, MeanColour(), settings=FEW).sections[0] for side in (other, shifted))
    assert tuple(row.measure for row in near.rows) == NAMES
    found = {row.measure: row.estimate for row in near.rows}
    assert found["FD∞"].low < 0 < found["FD∞"].high
    assert found["KID"].low < 0 < found["KID"].high
    assert found["precision"].value > 0.8
    worse = {row.measure: row.estimate for row in far.rows}
    assert worse["FD∞"].value == pytest.approx(6 * 50**2, rel=0.2)
    for name in ("FD", "FD∞", "KID"):
        assert worse[name].low > found[name].high, name
    for name in ("precision", "recall", "density", "coverage"):
        assert worse[name].value < found[name].value, name


def test_folders_shards_and_feature_files_say_the_same(tmp_path: Path) -> None:
    drawn, real = pictures(tmp_path / "drawn", 20, 0), pictures(tmp_path / "real", 20, 1)
    with tarfile.open(tmp_path / "drawn.tar", "w") as shard:
        for file in sorted(drawn.iterdir()):
            shard.add(file, file.name)
    (tmp_path / "kept").mkdir()
    whole = compare(drawn, real, MeanColour(), tmp_path / "kept", settings=FEW).sections[0].rows
    again = compare(tmp_path / "drawn.tar", real, MeanColour(), settings=FEW).sections[0].rows
    kept = tmp_path / "kept"
    files = compare(kept / "drawn.npz", kept / "reference.npz", settings=FEW).sections[0].rows
    assert [row.estimate for row in again] == [row.estimate for row in whole]
    assert [row.estimate for row in files] == [row.estimate for row in whole]
    np.save(tmp_path / "bare.npy", sides.read_features(kept / "drawn.npz").features)
    bare = compare(tmp_path / "bare.npy", kept / "reference.npz", settings=FEW).sections[0]
    assert [row.estimate for row in bare.rows] == [row.estimate for row in whole]
    assert "does not name its network" in " ".join(bare.details["notices"])


def test_a_report_is_written_as_json_and_markdown(tmp_path: Path) -> None:
    drawn, real = pictures(tmp_path / "drawn", 20, 0), pictures(tmp_path / "real", 24, 1)
    (tmp_path / "out").mkdir()
    report = compare(drawn, real, MeanColour(), tmp_path / "out", settings=FEW)
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored == json.loads(json.dumps(report.to_dict()))
    assert stored["facts"]["reference"] == f"{real}, 24 pictures"
    assert stored["facts"]["features"] == "mean colour, 0123456789abcdef"
    page = (tmp_path / "out" / "report.md").read_text()
    for name in NAMES:
        assert f"| {name} | {drawn} against {real} |" in page
    lines = report.to_table().splitlines()
    assert [line.split("  ")[0].strip() for line in lines[3:11]] == list(NAMES)
    assert len({len(line) for line in lines[2:11]}) == 1, "columns are aligned"


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn, real = pictures(tmp_path / "drawn", 12, 0), pictures(tmp_path / "real", 12, 1)
    asked = ["evaluate", "images", str(drawn), str(real), "--resamples", "10", "--device", "cpu"]
    assert main(asked) == 0
    said = capsys.readouterr()
    assert "FD∞" in said.out
    assert "12 pictures are few for 256 features" in said.err
    assert main([*asked, "--json", "--output", str(tmp_path / "out")]) == 0
    assert "judge (square 64)" in json.loads(capsys.readouterr().out)["facts"]["features"]
    files = [str(tmp_path / "out" / f"{name}.npz") for name in ("drawn", "reference")]
    assert main(["evaluate", "images", *files, "--resamples", "10"]) == 0


def test_evaluate_alone_lists_what_can_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate"]) == 0
    listed = capsys.readouterr().out
    assert "images" in listed
    assert "stickers" in listed


def test_what_makes_figures_unsafe_is_said(tmp_path: Path) -> None:
    png, jpeg = pictures(tmp_path / "png", 20, 0), pictures(tmp_path / "jpeg", 20, 1, kind="jpg")
    large = pictures(tmp_path / "large", 20, 2, size=32)
    assert notices(png, pictures(tmp_path / "more", 20, 3)) == ""
    assert "0 % of the drawn pictures and 100 % of the reference pictures are JPEG" in notices(png, jpeg)
    assert "drawn 16 × 16, reference 32 × 32" in notices(png, large)
    pictures(large / "small", 9, 4)
    assert "mixed sizes" in notices(large, png)
    assert "same pictures" in notices(png, png)
    (png / "broken.png").write_bytes(b"no picture")
    assert "1 drawn pictures could not be read (first: " in notices(png, large)


def test_transparent_pictures_are_seen_on_a_ground(tmp_path: Path) -> None:
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    side = sides.read_pictures(tmp_path, MeanColour(), lambda what, done, total: None)
    assert (side.features == 255).all() or (side.features == 128).all()


def test_sides_that_cannot_be_compared_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real, few = pictures(tmp_path / "real", 12, 0), pictures(tmp_path / "few", 1, 1)
    (tmp_path / "empty").mkdir()
    assert "found none in" in error(tmp_path / "empty", real, capsys=capsys)
    assert "does not exist" in error(tmp_path / "nowhere", real, capsys=capsys)
    assert "expected at least 10 pictures on each side" in error(few, real, capsys=capsys)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"no picture")
    assert "none of 1 can be read" in error(tmp_path / "bad", real, capsys=capsys)
    assert "expected features of judge, encoder" in error(real, real, "--features", "vgg", capsys=capsys)


def test_feature_files_that_cannot_be_compared_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng, places = np.random.default_rng(0), {}
    for name, rows in {"wide": rng.normal(size=(20, 5)), "narrow": rng.normal(size=(20, 4))}.items():
        np.save(places.setdefault(name, tmp_path / f"{name}.npy"), rows)
    assert "expected features of one width" in error(places["wide"], places["narrow"], capsys=capsys)
    np.savez(tmp_path / "moments.npz", mu=np.zeros(3), sigma=np.eye(3))
    assert "'features' in" in error(tmp_path / "moments.npz", places["wide"], capsys=capsys)
    np.save(tmp_path / "flat.npy", np.zeros(9))
    assert "[pictures, width] numbers" in error(tmp_path / "flat.npy", places["wide"], capsys=capsys)
    np.save(tmp_path / "object.npy", np.array([{"a": 1}]), allow_pickle=True)
    assert "cannot be read" in error(tmp_path / "object.npy", places["wide"], capsys=capsys)
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04")
    assert "cannot be read" in error(tmp_path / "cut.npz", places["wide"], capsys=capsys)
    np.save(tmp_path / "nan.npy", np.full((20, 5), np.nan))
    assert "finite" in error(tmp_path / "nan.npy", places["wide"], capsys=capsys)
    for name, network in (("a", "one, 1"), ("b", "two, 2")):
        np.savez(tmp_path / f"{name}.npz", features=rng.normal(size=(20, 5)), extractor=network)
    assert "expected features of one network" in error(tmp_path / "a.npz", tmp_path / "b.npz", capsys=capsys)
    with pytest.raises(UsageError, match="holds those of one, 1"):
        compare(tmp_path / "a.npz", tmp_path / "a.npz", MeanColour())
    with pytest.raises(UsageError, match="expected a network to look at the pictures"):
        compare(tmp_path / "a.npz", pictures(tmp_path / "real", 12, 0))


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("dinov2", "hf download facebook/dinov2-base"),
        ("clip", "hf download openai/clip-vit-large-patch14-336"),
        ("efficientnet", "python recipes/backbone.py"),
    ],
)
def test_missing_weights_are_named_with_where_to_get_them(name: str, source: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"got no folder: make one with .*{source}"):
        features.load_extractor(name)
    with pytest.raises(UsageError, match=f"got .*missing, which is none: make one with .*{source}"):
        features.load_extractor(name, tmp_path / "missing")


def test_bundled_networks_see_pictures_alone_as_in_company(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    seen = [Image.fromarray(rng.integers(0, 255, (40, 30, 3), np.uint8)) for _ in range(3)]
    tiny = EfficientNetConfig(stem_width=8, stages=(Stage(width=8, blocks=1, kernel=3, stride=2),), width=12)
    save_backbone(tmp_path / "backbone", EfficientNet(tiny), {})
    for name, weights in (("judge", None), ("encoder", None), ("efficientnet", tmp_path / "backbone")):
        extractor = features.load_extractor(name, weights)
        assert isinstance(extractor, features.FeatureExtractor)
        rows = extractor.features(seen)
        assert rows.shape == (3, extractor.width)
        assert rows.dtype == np.float32
        assert np.allclose(extractor.features(seen[1:2])[0], rows[1], rtol=1e-4, atol=1e-5), name
        assert len(extractor.digest) == 16


def test_dinov2_is_read_from_a_folder_and_gives_its_normalised_class_token(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    shape = transformers.Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, patch_size=56)
    with torch.random.fork_rng(devices=[]):
        model = transformers.Dinov2Model(shape).eval()
    model.save_pretrained(tmp_path / "dino")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 90, 3), np.uint8))
    extractor = features.load_extractor("dinov2", tmp_path / "dino")
    processor = transformers.BitImageProcessorPil(
        do_center_crop=False, size={"height": 224, "width": 224}, resample=3,
        image_mean=features.IMAGENET_MEAN, image_std=features.IMAGENET_SPREAD,
    )  # fmt: skip
    pixels = torch.from_numpy(np.stack(processor([image], return_tensors="np")["pixel_values"]))
    with torch.inference_mode():
        expected = model(pixel_values=pixels).pooler_output
    assert np.allclose(extractor.features([image]), expected, atol=1e-4)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UsageError, match="expected DINOv2 as transformers has it, .* holds bert"):
        features.load_extractor("dinov2", tmp_path / "other")
