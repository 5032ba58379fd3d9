"""Images as files: their settings inside, their size, their names; and sheets of them."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_finish import disc

from knn_diffusion import images
from knn_diffusion.errors import ImageError, KnnDiffusionError, MissingDependencyError, UsageError
from knn_diffusion.images import NumberedFiles, add_file, check_finish, check_format, encode, read_settings
from knn_diffusion.images.new_files import slug
from knn_diffusion.images.save import WEBP_BYTES, webp
from knn_diffusion.request import Neighbor, NeighborList, Output, source_name

SETTINGS = {
    "prompt": "a teal pineapple ☃\nsecond line", "seed": 5, "steps": 16, "sampler": "halton", "guidance_scale": 8.0,
    "model": "stickers", "k": 10, "neighbors": [{"id": "a", "score": 0.5}],
}  # fmt: skip
PARAMETERS = [
    "a teal pineapple ☃",
    "second line",
    "Steps: 16, Sampler: halton, CFG scale: 8.0, Seed: 5, Model: stickers, K: 10",
]


def picture(seed: int = 0, side: int = 24, channels: int = 3) -> Image.Image:
    """Noise, which no codec makes small."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, channels), dtype=np.uint8))


def output(count: int = 2, **changed: Any) -> Output:
    neighbors = NeighborList([Neighbor(id="a", score=0.5, source="/home/ann/private/cat.png")])
    facts: dict[str, Any] = {
        "prompt": "a cat", "neighbors": neighbors, "disagreeing": neighbors, "shortfall": 0, "seed": 0, "k": 1, "steps": 4, "guidance_scale": 2.0,
        "sampler": "halton", "model": "tiny", "seconds": 0.1, "images": [disc(32, 10 + i) for i in range(count)],
    }  # fmt: skip
    return Output(**facts | changed)


def test_a_png_holds_its_settings_as_text_and_as_json(tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    images.save_png(picture(), path, SETTINGS)
    with Image.open(path) as stored:
        assert json.loads(stored.text["knn_diffusion"]) == SETTINGS  # type: ignore[attr-defined]
        assert stored.text["parameters"].splitlines() == PARAMETERS  # type: ignore[attr-defined]
    assert np.array_equal(np.asarray(images.open_image(path)), np.asarray(picture()))


def test_a_webp_holds_the_text_where_image_browsers_look_for_it(tmp_path: Path) -> None:
    (tmp_path / "out.webp").write_bytes(webp(picture(), SETTINGS).content)
    with Image.open(tmp_path / "out.webp") as stored:
        comment = stored.getexif().get_ifd(0x8769)[0x9286]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be").splitlines() == PARAMETERS


@pytest.mark.parametrize("file_format", ["png", "webp", "svg"])
@pytest.mark.parametrize("prompt", [SETTINGS["prompt"], "nul \0, \ud800 lone, <b>&amp;</b> ]]> \x1b"])
def test_settings_come_back_from_every_format(tmp_path: Path, file_format: Any, prompt: str) -> None:
    if file_format == "svg":
        pytest.importorskip("vtracer")
    settings, finish = {**SETTINGS, "prompt": prompt}, check_finish({"border": True, "size": 64})
    made = encode(disc(32, 10), settings, file_format=file_format, finish=finish)
    path = tmp_path / "any-name"
    path.write_bytes(made.content)
    found = read_settings(path)
    assert found.pop("finish") == {"size": 64, "border": 0.03}
    assert found.pop("quality", 90) == 90
    assert found == settings


def test_a_file_of_a_plain_drawing_says_nothing_of_a_finish(tmp_path: Path) -> None:
    images.save_png(picture(), tmp_path / "saved.png", SETTINGS)
    assert encode(picture(), SETTINGS).content == (tmp_path / "saved.png").read_bytes()


def test_images_of_others_have_no_settings_and_broken_ones_are_refused(tmp_path: Path) -> None:
    for name in ("plain.png", "plain.webp"):
        picture().save(tmp_path / name)
        assert read_settings(tmp_path / name) == {}
    (tmp_path / "plain.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    assert read_settings(tmp_path / "plain.svg") == {}
    (tmp_path / "broken.png").write_bytes(b"nothing")
    for name in ("broken.png", "missing.png"):
        with pytest.raises(ImageError, match="expected an image with settings"):
            read_settings(tmp_path / name)


def test_a_webp_of_512_pixels_stays_under_100_kilobytes_and_says_what_that_took() -> None:
    drawing = picture(side=512)
    drawing.putalpha(disc(64, 28).getchannel("A").resize((512, 512)))
    noise = webp(drawing, SETTINGS)
    assert len(noise.content) < WEBP_BYTES == 100_000
    assert noise.reduced
    art = webp(images.finished(disc(128, 50), check_finish({"size": 512, "border": True})), SETTINGS)
    assert (len(art.content) < 30_000, art.quality, art.reduced) == (True, 90, False)


def test_a_larger_webp_keeps_its_quality() -> None:
    assert webp(picture(side=520), SETTINGS).quality == 90


def test_a_webp_keeps_transparency(tmp_path: Path) -> None:
    (tmp_path / "out.webp").write_bytes(webp(disc(64, 20), SETTINGS).content)
    with Image.open(tmp_path / "out.webp") as stored:
        assert (stored.mode, stored.getpixel((0, 0))[3], stored.getpixel((32, 32))[3]) == ("RGBA", 0, 255)  # type: ignore[index]


def test_an_unknown_format_is_wrong_use() -> None:
    assert check_format("webp") == "webp"
    with pytest.raises(UsageError, match="expected format as one of png, webp, svg, got 'gif'"):
        check_format("gif")


def test_a_full_disk_leaves_the_old_image_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.png"
    images.save_png(picture(), path, {"seed": 1})
    before = path.read_bytes()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for write in (lambda: images.save_png(picture(), path, {"seed": 2}), lambda: add_file(tmp_path, "new.png", b"x")):
        with pytest.raises(KnnDiffusionError) as caught:
            write()
        assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_that_is_taken_gets_a_number(tmp_path: Path) -> None:
    paths = [add_file(tmp_path, "sheet.png", bytes([i])) for i in range(3)]
    assert [path.name for path in paths] == ["sheet.png", "sheet-2.png", "sheet-3.png"]
    assert [path.read_bytes() for path in paths] == [b"\0", b"\1", b"\2"]


def test_images_of_a_prompt_share_the_folders_next_number(tmp_path: Path) -> None:
    (tmp_path / "006-a-hat-0.png").write_bytes(b"mine")
    (tmp_path / "2024.png").write_bytes(b"not one of ours")
    first, second = NumberedFiles(tmp_path, "a cat"), NumberedFiles(tmp_path, "a cat")
    names = [first.add(0, ".png", b"a").name, second.add(0, ".png", b"b").name, first.add(1, ".png", b"c").name]
    assert names == ["007-a-cat-0.png", "008-a-cat-0.png", "007-a-cat-1.png"]
    assert NumberedFiles(tmp_path / "fresh", "a cat").add(0, ".svg", b"d").name == "000-a-cat-0.svg"


def test_a_name_taken_meanwhile_moves_the_rest_to_a_new_number(tmp_path: Path) -> None:
    files = NumberedFiles(tmp_path, "a cat")
    files.add(0, ".png", b"a")
    (tmp_path / "000-a-cat-1.png").write_bytes(b"mine")
    assert files.add(1, ".png", b"b").name == "001-a-cat-1.png"
    assert (tmp_path / "000-a-cat-1.png").read_bytes() == b"mine"


def test_writers_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    def write(writer: int) -> Iterator[tuple[Path, bytes]]:
        files = NumberedFiles(tmp_path, "a cat")
        for i in range(5):
            yield files.add(i, ".png", f"{writer}-{i}".encode()), f"{writer}-{i}".encode()
        yield add_file(tmp_path, "sheet.png", f"{writer}".encode()), f"{writer}".encode()

    with ThreadPoolExecutor(8) as pool:
        written = [pair for pairs in pool.map(lambda writer: list(write(writer)), range(8)) for pair in pairs]
    assert len({path for path, _ in written}) == 8 * 6
    assert all(path.read_bytes() == content for path, content in written)
    assert sorted(tmp_path.iterdir()) == sorted(path for path, _ in written)


def test_slugs_are_file_names() -> None:
    assert slug("A red, red heart!") == "a-red-red-heart"
    assert slug("../../etc/passwd") == "etc-passwd"
    assert slug("♥") == "prompt"
    assert len(slug("word " * 50)) <= 40


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/home/ann/private/cat.png", "cat.png"),
        ("C:\\Users\\ann\\cat.png", "cat.png"),
        ("cats/red cat.png", "red cat.png"),
        ("/home/ann/shard-7.tar::000/cat.jpg", "shard-7.tar::cat.jpg"),
        ("/home/ann/table.parquet::12", "table.parquet::12"),
        ("https://host/ann/cat.jpg?key=secret", "cat.jpg"),
        ("", ""),
    ],
)
def test_a_name_of_a_source_leaks_no_folder(source: str, name: str) -> None:
    assert source_name(source) == name


@pytest.mark.parametrize("file_format", ["png", "webp", "svg"])
def test_saved_images_carry_names_where_an_output_has_paths(tmp_path: Path, file_format: str) -> None:
    if file_format == "svg":
        pytest.importorskip("vtracer")
    out = output()
    assert out.facts()["neighbors"][0]["source"] == "/home/ann/private/cat.png"
    for number, path in enumerate(out.save(tmp_path, file_format)):
        assert b"private" not in path.read_bytes()
        settings = read_settings(path)
        assert settings["neighbors"] == settings["disagreeing"] == [{"id": "a", "score": 0.5, "source": "cat.png"}]
        assert settings["image"] == number


def test_an_output_is_finished_any_number_of_times_and_never_changes(tmp_path: Path) -> None:
    out = output()
    drawn = [image.tobytes() for image in out.images]
    teal, bordered = out.finished(background="teal"), out.finished(size=64, border=True)
    assert [image.mode for image in teal] == ["RGB"] * 2
    assert [image.size for image in bordered] == [(64, 64)] * 2
    paths = [*out.save(tmp_path, "webp", size=64, border=True), *out.save(tmp_path)]
    assert [path.name for path in paths] == [
        "000-a-cat-0.webp", "000-a-cat-1.webp", "001-a-cat-0.png", "001-a-cat-1.png",
    ]  # fmt: skip
    assert images.open_image(paths[0]).size == (64, 64)
    assert [image.tobytes() for image in out.images] == drawn


def test_an_output_gives_svgs_with_their_settings(tmp_path: Path) -> None:
    pytest.importorskip("vtracer")
    texts = output().svg(border=True, background="#102030")
    assert len(texts) == 2
    assert all('fill="#102030"' in text for text in texts)
    (tmp_path / "one.svg").write_text(texts[1])
    assert read_settings(tmp_path / "one.svg")["image"] == 1


def test_wrong_options_of_an_output_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="expected size from 16"):
        output().save(tmp_path, size=3)
    with pytest.raises(UsageError, match="expected format as one of"):
        output().save(tmp_path, "bmp")
    monkeypatch.setitem(sys.modules, "vtracer", None)
    with pytest.raises(MissingDependencyError, match="vtracer"):
        output().save(tmp_path, "svg")
    assert list(tmp_path.iterdir()) == []


def test_transparent_pictures_lie_on_a_light_checkerboard() -> None:
    half = Image.new("RGBA", (32, 32), (255, 255, 255, 255))
    half.paste((200, 0, 0, 0), (0, 0, 32, 16))
    sheet = np.asarray(images.grid([half], columns=1, cell=32))[4:36, 4:36]
    assert set(np.unique(sheet[:16])) == {225, 255}
    assert (sheet[0, :8] == 255).all()
    assert (sheet[0, 8:16] == 225).all()
    assert (sheet[8:16, :8] == 225).all()
    assert (sheet[16:] == 255).all()


def test_a_grid_places_pictures_row_by_row_with_labels_below() -> None:
    colours = ["red", "lime", "blue"]
    sheet = images.grid([Image.new("RGB", (8, 8), colour) for colour in colours], columns=2, cell=16)
    assert sheet.size == (2 * 20 + 4, 2 * 20 + 4)
    for colour, place in zip([(255, 0, 0), (0, 255, 0), (0, 0, 255)], [(12, 12), (32, 12), (12, 32)], strict=True):
        assert sheet.getpixel(place) == colour
    assert sheet.getpixel((32, 32)) == (255, 255, 255)
    labelled = images.grid(
        [Image.new("RGB", (8, 8), "red")], columns=1, cell=64, labels=["a teal pineapple on a white background"]
    )
    assert labelled.width == 72
    assert (np.asarray(labelled)[72:].min(axis=-1) < 128).any()


def test_small_pictures_are_enlarged_without_blur_and_others_keep_their_shape() -> None:
    checks = Image.fromarray((np.indices((4, 4)).sum(axis=0) % 2 * 255).astype(np.uint8))
    sheet = np.asarray(images.grid([checks], columns=1, cell=16))[4:20, 4:20]
    assert set(np.unique(sheet)) == {0, 255}
    wide = np.asarray(images.grid([Image.new("RGB", (40, 10), "black")], columns=1, cell=20))[4:24, 4:24, 0]
    assert ((wide < 20).sum(axis=0) == 5).all()


def test_a_grid_of_nothing_or_of_unmatched_labels_is_wrong_use() -> None:
    with pytest.raises(UsageError, match="expected images, columns and a cell size"):
        images.grid([], columns=2, cell=8)
    with pytest.raises(UsageError, match="one label for each of 1 images, got 2"):
        images.grid([Image.new("RGB", (2, 2))], columns=1, cell=8, labels=["a", "b"])
