"""What the objectives train on: decoded once, cached, and never stale."""

from __future__ import annotations

import json
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from knn_diffusion import images
from knn_diffusion.errors import UsageError
from knn_diffusion.image_index import content_digest
from knn_diffusion.training import data
from knn_diffusion.training.data import PixelDataset, cached_array, load_pixels

SIZE = 8


def paint(path: Path, colour: tuple[int, int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), colour).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    paint(tmp_path / "images" / "a.png", (250, 0, 0))
    paint(tmp_path / "images" / "b.png", (0, 0, 250))
    return tmp_path / "images"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each decoding took on."""
    calls: list[int] = []
    decode = data._decode

    def counting(found: list[object], *others: object) -> None:
        calls.append(len(found))
        decode(found, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(data, "_decode", counting)
    return calls


def test_images_become_square_pixels_with_the_ids_an_index_gives_them(folder: Path, tmp_path: Path) -> None:
    found = load_pixels([folder], SIZE, tmp_path / "cache")
    assert found.array.shape == (2, SIZE, SIZE, 3)
    assert [tuple(image[0, 0]) for image in found.array] == [(250, 0, 0), (0, 0, 250)]
    assert found.ids[0] == content_digest(Image.open(folder / "a.png"))[:16]


def test_transparent_images_lie_on_a_ground_or_keep_their_alpha(folder: Path, tmp_path: Path) -> None:
    sticker = Image.new("RGBA", (40, 30), (0, 0, 0, 0))
    sticker.paste((0, 200, 0, 255), (20, 5, 35, 20))
    sticker.save(folder / "c.png")
    flat, full = (load_pixels([folder], 16, tmp_path / "cache", alpha=alpha) for alpha in (False, True))
    assert flat.array.shape == (3, 16, 16, 3)
    assert full.array.shape == (3, 16, 16, 4)
    assert flat.ids == full.ids
    assert flat.digest != full.digest
    opened = [images.open_image(folder / f"{name}.png") for name in "abc"]
    for number, one in enumerate(opened):
        assert np.array_equal(flat.array[number], images.to_array(images.square(one, 16)))
        assert np.array_equal(full.array[number], images.to_array(images.frame(one, 16).convert("RGBA")))
    assert (full.array[:2, ..., 3] == 255).all()
    assert full.array[2, 15, 15, 3] == 0
    assert PixelDataset(flat.array).batch(torch.tensor([2]), torch.Generator())["pixels"].shape == (1, 3, 16, 16)


def test_an_image_that_is_transparent_everywhere_is_left_out(folder: Path, tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(folder / "blank.png")
    for alpha in (False, True):
        assert len(load_pixels([folder], SIZE, tmp_path / f"cache{alpha}", alpha=alpha).ids) == 2
        skipped = json.loads(next((tmp_path / f"cache{alpha}").rglob("skipped.json")).read_text())
        assert [(one["key"], "all transparent" in one["reason"]) for one in skipped] == [("blank.png", True)]


def test_images_are_decoded_once(folder: Path, tmp_path: Path, decoded: list[int]) -> None:
    first, second = (load_pixels([folder], SIZE, tmp_path / "cache") for _ in range(2))
    assert decoded == [2]
    assert (first.digest, first.ids) == (second.digest, second.ids)
    assert np.array_equal(first.array, second.array)


def test_a_file_that_changed_under_its_name_is_decoded_again(folder: Path, tmp_path: Path, decoded: list[int]) -> None:
    before = load_pixels([folder], SIZE, tmp_path / "cache").digest
    times = os.stat(folder / "a.png")
    paint(folder / "a.png", (0, 250, 0))
    os.utime(folder / "a.png", ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    after = load_pixels([folder], SIZE, tmp_path / "cache")
    assert decoded == [2, 2]
    assert tuple(after.array[0, 0, 0]) == (0, 250, 0)
    assert after.digest != before


def test_a_shard_that_changed_is_decoded_again(folder: Path, tmp_path: Path, decoded: list[int]) -> None:
    for time, colour in ((1_000, (250, 0, 0)), (2_000, (0, 250, 0))):
        paint(folder / "a.png", colour)
        with tarfile.open(tmp_path / "shard.tar", "w") as archive:
            archive.add(folder / "a.png", "a.png")
        os.utime(tmp_path / "shard.tar", (time, time))
        pixels = load_pixels([tmp_path / "shard.tar"], SIZE, tmp_path / "cache")
        assert tuple(pixels.array[0, 0, 0]) == colour
    assert decoded == [1, 1]


def test_a_cache_that_is_cut_short_is_made_again(folder: Path, tmp_path: Path) -> None:
    whole = load_pixels([folder], SIZE, tmp_path / "cache")
    kept, digest = whole.array.copy(), whole.digest
    del whole
    pixels = next((tmp_path / "cache").rglob("pixels.u8"))
    for mend in (lambda: pixels.write_bytes(pixels.read_bytes()[:-5]), pixels.unlink):
        mend()
        again = load_pixels([folder], SIZE, tmp_path / "cache")
        assert again.digest == digest
        assert np.array_equal(again.array, kept)


def test_unreadable_images_are_left_out_and_listed(folder: Path, tmp_path: Path) -> None:
    (folder / "broken.png").write_bytes(b"no image")
    said: list[str] = []
    for _ in range(2):  # decoded, then found in the cache
        assert len(load_pixels([folder], SIZE, tmp_path / "cache", notice=said.append).ids) == 2
    assert said[0] == said[1]
    assert re.fullmatch(r"skipped 1 of 3 pictures \(first: expected .*broken.png .*\); all in .*skipped.json", said[0])
    skipped = json.loads(next((tmp_path / "cache").rglob("skipped.json")).read_text())
    assert [one["key"] for one in skipped] == ["broken.png"]


def test_a_file_name_that_is_no_utf_8_is_an_image_like_others(folder: Path, tmp_path: Path) -> None:
    broken = folder / os.fsdecode(b"caf\xe9.png")
    try:
        broken.write_bytes(b"no image")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    assert len(load_pixels([folder], SIZE, tmp_path / "cache").ids) == 2
    skipped = json.loads(next((tmp_path / "cache").rglob("skipped.json")).read_text(encoding="utf-8"))
    assert [one["source"] for one in skipped] == [str(broken)]


def test_nothing_readable_is_wrong_use(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UsageError, match="expected readable images, all 1 failed"):
        load_pixels([tmp_path / "broken.png"], SIZE, tmp_path / "cache")


def test_an_array_is_computed_once_for_the_same_facts(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> np.ndarray:
        calls.append(1)
        return np.arange(6, dtype=np.int32).reshape(2, 3)

    for facts in ({"k": 1, "index": "a"}, {"index": "a", "k": 1}, {"k": 2, "index": "a"}):
        assert cached_array(tmp_path, "neighbors", facts, compute).tolist() == [[0, 1, 2], [3, 4, 5]]
    assert len(calls) == 2


def test_a_damaged_cached_array_is_computed_again(tmp_path: Path) -> None:
    made = cached_array(tmp_path, "tokens", {"k": 1}, lambda: np.arange(3)).tolist()
    path = next(tmp_path.glob("tokens-*.npy"))
    for content in (path.read_bytes()[:-4], b"", b"nonsense"):
        path.write_bytes(content)
        assert cached_array(tmp_path, "tokens", {"k": 1}, lambda: np.arange(3)).tolist() == made


def test_a_batch_holds_the_images_asked_for_in_minus_1_to_1() -> None:
    array = np.zeros((3, 2, 2, 3), np.uint8)
    array[1] = 255
    pixels = PixelDataset(array).batch(torch.tensor([1, 0, 1]), torch.Generator())["pixels"]
    assert pixels.shape == (3, 3, 2, 2)
    assert pixels.amin(dim=(1, 2, 3)).tolist() == [1.0, -1.0, 1.0]


def test_mirroring_depends_on_the_generator_alone() -> None:
    array = np.zeros((1, 1, 2, 3), np.uint8)
    array[:, :, 1] = 255
    dataset, rows = PixelDataset(array, mirror=True), torch.zeros(64, dtype=torch.long)
    first, second = (dataset.batch(rows, torch.Generator().manual_seed(5))["pixels"] for _ in range(2))
    assert torch.equal(first, second)
    assert 16 < int((first[:, 0, 0, 0] > 0).sum()) < 48
