"""Odd but valid images give the right pixels, bad ones give one line; nothing half-written is ever left."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import random
import struct
import tarfile
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from knn_diffusion import images
from knn_diffusion.errors import ImageError, MissingDependencyError, UsageError

TRANSPOSED = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.transpose(1, 0, 2),
    6: np.rot90, 7: lambda a: a[::-1, ::-1].transpose(1, 0, 2), 8: lambda a: np.rot90(a, -1),
}  # fmt: skip
"""How a camera that writes this EXIF orientation has turned the upright picture before saving it."""


def picture(width: int = 24, height: int = 16) -> np.ndarray:
    """A smooth picture without symmetry."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    return np.stack([40 + 150 * x / width, 30 + 200 * y / height, 200 - 80 * x / width], axis=-1).astype(np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def read(content: bytes) -> np.ndarray:
    opened = images.open_image(content)
    assert opened.mode == "RGB"
    return np.asarray(opened).astype(int)


def test_every_lossless_format_gives_its_pixels_back() -> None:
    for kind, options in (
        ("PNG", {}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ):
        assert np.array_equal(read(encoded(Image.fromarray(picture()), kind, **options)), picture()), kind


@pytest.mark.parametrize("kind", ["JPEG", "AVIF", "WEBP"])
def test_every_lossy_format_gives_nearly_its_pixels_back(kind: str) -> None:
    assert np.abs(read(encoded(Image.fromarray(picture(64, 64)), kind, quality=95)) - picture(64, 64)).max() <= 12


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_a_rotated_photo_stands_upright(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(TRANSPOSED[orientation](picture())))
    options = {"lossless": True} if kind == "WEBP" else {}
    assert np.array_equal(read(encoded(stored, kind, exif=exif, **options)), picture())


def test_a_damaged_exif_block_does_not_spoil_the_pixels() -> None:
    assert np.array_equal(read(encoded(Image.fromarray(picture()), exif=b"Exif\0\0II*\0\xff\xff\xff\xff")), picture())


def test_cmyk_keeps_its_colours() -> None:
    stored = Image.fromarray(picture()).convert("CMYK")
    assert np.abs(read(encoded(stored, "TIFF")) - picture()).max() <= 2
    assert np.abs(read(encoded(stored, "JPEG", quality=98, subsampling=0)) - picture()).max() <= 12


def test_sixteen_bit_grey_is_not_white() -> None:
    levels = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    for kind in ("PNG", "TIFF"):
        got = read(encoded(Image.fromarray(levels), kind))
        assert np.abs(got - np.arange(256).reshape(16, 16, 1)).max() <= 1, kind


def test_grey_of_32_bits_is_read_by_the_range_it_was_meant_for() -> None:
    ramp = np.arange(256).reshape(16, 16)
    for values in (
        ramp.astype(np.int32),
        (ramp * 257).astype(np.int32),
        (ramp / 255).astype(np.float32),
        (ramp * 1e6 - 5e5).astype(np.float32),
    ):
        assert np.abs(read(encoded(Image.fromarray(values), "TIFF")) - ramp[..., None]).max() <= 1, values.dtype
    wild = np.array([[np.nan, np.inf], [0.5, 1.0]], np.float32)
    assert read(encoded(Image.fromarray(wild), "TIFF"))[1, 1].tolist() == [255, 255, 255]


def _rgba() -> Image.Image:
    alpha = np.zeros((16, 24, 1), np.uint8)
    alpha[:, 12:] = 255
    alpha[:, 8:12] = 128
    return Image.fromarray(np.concatenate([picture(), alpha], axis=-1), "RGBA")


def read_alpha(content: bytes | Image.Image) -> np.ndarray:
    opened = images.open_image(content)
    assert opened.mode == "RGBA"
    return np.asarray(opened).astype(int)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("TIFF", {})])
def test_transparency_is_kept(kind: str, options: dict[str, Any]) -> None:
    assert np.array_equal(read_alpha(encoded(_rgba(), kind, **options)), np.asarray(_rgba()))


@pytest.mark.parametrize("mode", ["LA", "PA", "La", "RGBa"])
def test_other_modes_with_transparency_keep_it_too(mode: str) -> None:
    grey = np.full((4, 4, 2), (10, 0), np.uint8)
    grey[0] = (10, 255)
    stored = Image.fromarray(grey, "LA")
    stored = stored.convert("RGBA").convert(mode) if mode in ("PA", "RGBa") else stored.convert(mode)
    got = read_alpha(stored)
    assert (got[0] == [10, 10, 10, 255]).all()
    assert (got[1:, :, 3] == 0).all()


def test_a_palette_with_a_transparent_entry_keeps_it() -> None:
    stored = Image.new("P", (4, 2), 1)
    stored.putpalette([200, 0, 0, 0, 0, 200])
    stored.putpixel((0, 0), 0)
    for kind in ("PNG", "GIF"):
        got = read_alpha(encoded(stored, kind, transparency=0))
        assert got[0, 0, 3] == 0
        assert got[1, 1].tolist() == [0, 0, 200, 255]


def test_one_bit_and_grey_pictures_with_a_transparent_level_are_read() -> None:
    bits = Image.fromarray(np.eye(4, dtype=bool))
    assert read(encoded(bits))[..., 0].tolist() == (np.eye(4, dtype=int) * 255).tolist()
    grey = Image.fromarray(np.array([[7, 90]], np.uint8))
    assert read_alpha(encoded(grey, transparency=7))[0].tolist() == [[7, 7, 7, 0], [90, 90, 90, 255]]


def test_a_picture_that_nothing_shows_through_is_rgb() -> None:
    opaque = Image.fromarray(picture())
    opaque.putalpha(255)
    assert np.array_equal(read(encoded(opaque)), picture())
    opaque.putalpha(247)  # noise
    assert np.array_equal(read(encoded(opaque)), picture())
    indexed = Image.new("P", (4, 2), 1)
    indexed.putpalette([200, 0, 0, 0, 0, 200])
    assert (read(encoded(indexed, "PNG", transparency=0)) == [0, 0, 200]).all()


@pytest.mark.parametrize("mode", ["YCbCr", "LAB", "HSV", "RGBX", "CMYK", "1", "L", "P", "I", "F", "I;16", "I;16B"])
def test_pictures_of_any_mode_are_taken(mode: str) -> None:
    made = Image.new(mode, (3, 2))
    assert images.open_image(made).size == (3, 2)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_of_an_animation_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert np.abs(read(content) - [255, 0, 0]).max() <= 6
    assert images.open_image(content).info[images.OF_SEVERAL] is True
    assert images.open_image(encoded(frames[0], kind)).info[images.OF_SEVERAL] is False


def test_a_damaged_second_frame_does_not_spoil_the_first() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    content = bytearray(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    second = content.rindex(b"\x2c")  # the separator before a frame
    for change in (content[: second + 3], content[:second] + b"\x99" * 40):
        assert (read(bytes(change)) == [254, 0, 0]).all() or (read(bytes(change)) == [255, 0, 0]).all()


def test_an_embedded_colour_profile_becomes_srgb() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = encoded(Image.fromarray(picture()), icc_profile=lab)
    assert np.abs(read(same) - picture()).max() <= 2
    swapped = _profile_with_red_and_blue_swapped(lab)
    got = read(encoded(Image.fromarray(picture()), icc_profile=swapped))
    assert np.abs(got - picture()[..., ::-1]).max() <= 3


def _profile_with_red_and_blue_swapped(profile: bytes) -> bytes:
    renamed = profile.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")).replace(b"sRGB", b"swap")
    return renamed.replace(b"rXYZ", b"tmp1").replace(b"bXYZ", b"rXYZ").replace(b"tmp1", b"bXYZ")


def test_a_damaged_colour_profile_is_ignored() -> None:
    assert np.array_equal(read(encoded(Image.fromarray(picture()), icc_profile=b"no profile" * 20)), picture())


@pytest.mark.parametrize("shape", [(1, 1), (20000, 1), (1, 20000), (2, 3)])
def test_pictures_of_any_shape_can_be_squared(shape: tuple[int, int]) -> None:
    got = images.square(images.open_image(encoded(Image.new("RGB", shape, (9, 80, 200)))), 8)
    assert got.size == (8, 8)
    assert np.abs(np.asarray(got).astype(int) - [9, 80, 200]).max() <= 1


def test_square_takes_the_centre_and_averages_whole_blocks() -> None:
    levels = np.zeros((4, 8, 3), np.uint8)
    levels[:, 2:6] = np.arange(16).reshape(4, 4, 1) * 10
    got = np.asarray(images.square(Image.fromarray(levels), 2))
    expected = levels[:, 2:6].reshape(2, 2, 2, 2, 3).mean(axis=(1, 3))
    assert np.abs(got - expected).max() <= 0.5
    assert images.square(Image.fromarray(levels), 4).tobytes() == levels[:, 2:6].tobytes()
    banded = np.full((50, 150, 3), (255, 0, 0), np.uint8)
    banded[:, 50:100] = (0, 0, 255)
    assert (np.asarray(images.square(Image.fromarray(banded), 32)) == (0, 0, 255)).all()


def test_square_is_antialiased_at_every_size() -> None:
    y, x = np.mgrid[0:200, 0:200]
    checks = Image.fromarray((((x + y) % 2) * 255).astype(np.uint8)).convert("RGB")
    for size in (50, 64, 77, 100):
        assert np.abs(np.asarray(images.square(checks, size)).astype(int) - 127).max() <= 6, size


def test_square_of_a_transparent_picture_is_its_frame_on_a_ground() -> None:
    framed = images.frame(_rgba(), 32)
    assert images.square(_rgba(), 32).tobytes() == images.on_ground(framed, (255, 255, 255)).tobytes()
    white = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    white.paste((255, 255, 255, 255), (10, 10, 30, 30))
    assert images.square(white, 16).getpixel((15, 15)) == (128, 128, 128)
    assert images.square(white, 16).getpixel((8, 8)) == (255, 255, 255)
    with pytest.raises(ImageError, match="all transparent"):
        images.square(Image.new("RGBA", (6, 6), (200, 0, 0, 0)), 3)


def test_square_refuses_a_size_below_one() -> None:
    with pytest.raises(UsageError, match="at least 1 pixel, got 0"):
        images.square(Image.new("RGB", (6, 6)), 0)


def test_bytes_and_pixels_are_each_others_inverse() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    pixels = images.pixels_from_uint8(levels)
    assert pixels.shape == (1, 3, 16, 16)
    assert (pixels.min().item(), pixels.max().item()) == (-1, 1)
    assert np.array_equal(images.uint8_from_pixels(pixels), levels)
    assert images.uint8_from_pixels(torch.full((1, 3, 1, 1), 7.0)).max() == 255
    for array in (levels[0], np.asarray(_rgba())):
        assert np.array_equal(images.to_array(images.from_array(array)), array)


def test_transparent_bytes_and_pixels_are_each_others_inverse_where_something_is_seen() -> None:
    rng = np.random.default_rng(0)
    levels = rng.integers(0, 256, (3, 16, 16, 4), np.uint8)
    levels[0, ..., 3] = 0
    levels[1, ..., 3] = 255
    back = images.uint8_from_pixels(images.pixels_from_uint8(levels))
    assert (back[0] == 0).all()
    assert np.array_equal(back[1], levels[1])
    seen = levels[2, ..., 3] > 127
    assert np.abs(back[2].astype(int) - levels[2])[seen].max() <= 1
    assert np.array_equal(back[..., 3], levels[..., 3])


def test_composing_over_a_ground_is_what_pillow_composes() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (1, 9, 9, 4), np.uint8)
    ground = torch.tensor([200.0, 30, 90]).view(1, 3, 1, 1) / 127.5 - 1
    composed = images.uint8_from_pixels(images.over_ground(images.pixels_from_uint8(levels), ground))
    paper = Image.new("RGBA", (9, 9), (200, 30, 90, 255))
    paper.alpha_composite(Image.fromarray(levels[0]))
    assert np.abs(composed[0].astype(int) - np.asarray(paper.convert("RGB"))).max() <= 1
    opaque = torch.rand(1, 3, 4, 4)
    assert images.over_ground(opaque, ground) is opaque


def _png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body)) + b"\0\0\0\0IDAT"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is none of these: convert it or leave it out"),
        (b"just text", "expected PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF, the given image is none of these"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is none of these"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is none of these"),
        (encoded(Image.new("RGB", (4, 4)), "PPM"), "is none of these"),
        (encoded(Image.new("RGB", (4, 4)), "ICO"), "is none of these"),
        (_png_header(8001, 8001), "expected at most 64 megapixels, the given image has 8001 × 8001: make it smaller"),
        (_png_header(12000, 12000), "expected at most 64 megapixels, the given image has 12000 × 12000: make it"),
        (_png_header(2**31 - 1, 2**31 - 1), "expected at most 64 megapixels, the given image has more"),
        (_png_header(16, 16), "expected a whole image, the given image cannot be decoded"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(content: bytes, message: str) -> None:
    with pytest.raises(ImageError) as caught:
        images.open_image(content)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "AVIF"])
def test_a_truncated_image_is_refused_not_half_shown(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    content = encoded(Image.fromarray(noise), kind)
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(ImageError, match="the given image"):
            images.open_image(content[: int(len(content) * share)])


def test_mutilated_files_are_read_or_refused_never_anything_else() -> None:
    rng = random.Random(0)
    base = Image.fromarray(picture(32, 32))
    seeds = [encoded(base, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")]
    seeds.append(encoded(base, icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()))
    for _ in range(400):
        content = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 3, 20))):
            content[rng.randrange(min(len(content), rng.choice((64, 10**6))))] = rng.randrange(256)
        with contextlib.suppress(ImageError):
            assert images.open_image(bytes(content)).mode in ("RGB", "RGBA")


def test_files_that_cannot_be_opened_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.png is missing: check the path"):
        images.open_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="is no regular file"):
        images.open_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ImageError, match="is no regular file"):
        images.open_image(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    with pytest.raises(ImageError, match="is missing"):
        images.open_image(tmp_path / "loop.png")
    odd = tmp_path / "odd\nname🎈.png"
    odd.write_bytes(b"text")
    with pytest.raises(ImageError, match=r"odd\?name🎈\.png is none of these"):
        images.open_image(odd)


def test_the_kind_of_a_file_is_decided_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(Image.fromarray(picture())))
    assert np.array_equal(np.asarray(images.open_image(path)), picture())


def test_a_huge_text_chunk_is_refused_or_ignored() -> None:
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("comment", "x" * 70_000_000, zip=True)
    content = encoded(Image.fromarray(picture()), pnginfo=chunks)
    with pytest.raises(ImageError, match="cannot be decoded"):
        images.open_image(content)


def _fill(folder: Path) -> None:
    (folder / "b").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    for name in ("z.png", "a.JPG", "b/c.webp", ".hidden/d.png", ".e.png"):
        kind = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[name.rsplit(".", 1)[1].lower()]
        (folder / name).write_bytes(encoded(Image.fromarray(picture()), kind))
    (folder / "notes.txt").write_text("no image")


def test_folders_are_searched_recursively_in_sorted_order(tmp_path: Path) -> None:
    _fill(tmp_path)
    found = images.find_images([tmp_path])
    assert [image.key for image in found] == ["a.JPG", "z.png", os.path.join("b", "c.webp")]
    assert [image.source for image in found] == [str(tmp_path / image.key) for image in found]
    assert all(image.load().size == (24, 16) for image in found)


def test_files_and_wildcards_are_taken_once_each(tmp_path: Path) -> None:
    _fill(tmp_path)
    found = images.find_images([tmp_path / "z.png", str(tmp_path / "*.png"), tmp_path])
    assert [image.key for image in found] == ["z.png", "a.JPG", os.path.join("b", "c.webp")]


def test_pictures_that_cannot_be_read_are_listed_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("phone.HEIC", "notes.txt"):
        (tmp_path / name).write_bytes(b"?")
    (tmp_path / "closed").mkdir()
    scan = os.scandir

    def closed(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    found = images.find_images([tmp_path])
    assert [Path(one.source).name for one in found] == ["a.png", "phone.HEIC", "closed"]
    with pytest.raises(ImageError, match=r"phone\.HEIC is of a format that is not read: save it as PNG or JPEG"):
        found[1].load()
    with pytest.raises(ImageError, match=r"closed cannot be read \(Permission denied\): change its permissions"):
        found[2].load()


def test_a_missing_path_and_an_empty_folder_are_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere does not exist: check the path"):
        images.find_images([tmp_path / "nowhere"])
    with pytest.raises(UsageError, match=r"\*\.png does not exist"):
        images.find_images([str(tmp_path / "*.png")])
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UsageError, match="found none in"):
        images.find_images([tmp_path])
    with pytest.raises(UsageError, match="found none in no path"):
        images.find_images([])


def test_a_symlink_loop_does_not_trap_the_search(tmp_path: Path) -> None:
    _fill(tmp_path / "real")
    (tmp_path / "real" / "again").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "self.png").symlink_to("self.png")
    assert len(images.find_images([tmp_path])) == 3


def _shard(path: Path) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in (
            ("0001.png", encoded(Image.fromarray(picture()))), ("0001.txt", b"caption"), ("0001.json", b"{}"),
            ("../../escape.png", encoded(Image.new("RGB", (5, 5)))), ("evil.pth", b"\x80\x04"), ("0002.jpg", b"broken"),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return path


def test_shards_are_read_in_place_and_links_and_strangers_passed_over(tmp_path: Path) -> None:
    shard = _shard(tmp_path / "part.tar")
    found = images.find_images([tmp_path])
    assert [image.key for image in found] == ["0001.png", "../../escape.png", "0002.jpg"]
    assert found[0].source == f"{shard}::0001.png"
    assert np.array_equal(np.asarray(found[0].load()), picture())
    with pytest.raises(ImageError, match=r"part\.tar::0002\.jpg is none of these"):
        found[2].load()
    assert not (tmp_path.parent / "escape.png").exists()


def test_a_damaged_shard_is_one_image_that_fails_to_load(tmp_path: Path) -> None:
    whole = _shard(tmp_path / "part.tar").read_bytes()
    (tmp_path / "part.tar").unlink()
    (tmp_path / "cut.tar").write_bytes(whole[:560])
    (tmp_path / "noise.tar").write_bytes(b"noise" * 1000)
    found = images.find_images([tmp_path])
    assert [image.key for image in found][-1] == "noise.tar"
    for image in found:
        with pytest.raises(ImageError) as caught:
            image.load()
        assert "\n" not in str(caught.value)
    assert "noise.tar is damaged" in str(caught.value)


def test_parquet_tables_of_plain_bytes_and_of_image_structs_are_read(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    contents = [encoded(Image.new("RGB", (4, 4), (number, 0, 0))) for number in (10, 20, 30)]
    plain = pyarrow.table({"text": ["a", "b", "c"], "jpg": contents})
    parquet.write_table(plain, tmp_path / "plain.parquet", row_group_size=2)
    structs = pyarrow.table({"image": [{"bytes": contents[0], "path": "x.png"}, None, {"bytes": b"bad", "path": None}]})
    parquet.write_table(structs, tmp_path / "structs.parquet")
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "words.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no table")
    found = {image.source.removeprefix(f"{tmp_path}/"): image for image in images.find_images([tmp_path])}
    assert [np.asarray(found[f"plain.parquet::{row}"].load())[0, 0, 0] for row in range(3)] == [10, 20, 30]
    assert found["structs.parquet::0"].load().size == (4, 4)
    for source, message in (
        ("structs.parquet::1", "holds none"), ("structs.parquet::2", "is none of these"),
        ("words.parquet", "expected a column of images"), ("broken.parquet", "is damaged"),
    ):  # fmt: skip
        with pytest.raises(ImageError, match=message):
            found[source].load()


def test_parquet_without_pyarrow_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"pip install knn-diffusion\[parquet\]"):
        images.find_images([tmp_path])


@pytest.mark.parametrize("side", [8, 11, 64, 100, 127, 128, 300, 515])
def test_averages_are_those_of_equal_areas(side: int) -> None:
    array = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    if side > 128:
        array[:] = np.linspace(0, 255, side)[:, None, None]
    fine = array.astype(float).repeat(8, 0).repeat(8, 1)
    expected = fine.reshape(8, side, 8, side, 3).mean((1, 3))
    assert np.abs(images.averages(Image.fromarray(array), 8) - expected).max() <= (0.51 if side < 256 else 1.5)


@pytest.mark.parametrize("side", [77, 96, 100, 250, 300, 500])
def test_a_resized_copy_has_the_same_averages(side: int) -> None:
    random = np.random.default_rng(0)
    for _ in range(10):
        coarse = Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8))
        picture = coarse.resize((128, 128), Image.Resampling.NEAREST)
        copy = picture.resize((side, side), Image.Resampling.LANCZOS)
        one, two = (images.averages(each, 8).astype(int) for each in (picture, copy))
        assert np.abs(one - two).mean() < 1.5


@pytest.mark.parametrize("side", [77, 96, 250, 500])
def test_a_resized_copy_of_a_transparent_picture_has_the_same_averages(side: int) -> None:
    random = np.random.default_rng(0)
    for _ in range(5):
        coarse = random.integers(0, 256, (9, 9, 4), dtype=np.uint8)
        coarse[..., 3] = np.where(coarse[..., 3] > 100, 255, 0)
        picture = Image.fromarray(coarse, "RGBA").resize((128, 128), Image.Resampling.NEAREST)
        copy = picture.resize((side, side), Image.Resampling.LANCZOS)
        one, two = (images.averages(each, 8).astype(int) for each in (picture, copy))
        assert np.abs(one - two).mean() < 3


def test_averages_of_a_transparent_picture_are_of_its_frame_on_a_ground() -> None:
    wide = Image.new("RGBA", (200, 80), (0, 0, 0, 0))
    wide.paste((200, 0, 0, 255), (150, 20, 180, 50))
    tight = Image.new("RGBA", (30, 30), (200, 0, 0, 255))
    tight.putpixel((0, 0), (200, 0, 0, 200))
    assert np.abs(images.averages(wide, 8).astype(int) - images.averages(tight, 8)).max() <= 4
    assert (images.averages(wide, 8)[2:6, 2:6] == [200, 0, 0]).all()


def test_packed_archives_are_listed_as_unusable(tmp_path: Path) -> None:
    for name in ("a.tar.gz", "b.tgz", "c.zip", "d.tar.zst"):
        (tmp_path / name).write_bytes(b"packed")
    for paths in ([tmp_path], sorted(tmp_path.iterdir())):
        found = images.find_images(paths)
        assert [Path(one.source).name for one in found] == ["a.tar.gz", "b.tgz", "c.zip", "d.tar.zst"]
        for one in found:
            with pytest.raises(ImageError, match="is packed: unpack it to a .tar or a folder"):
                one.load()


def test_the_tables_of_facts_beside_shards_are_passed_over(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    with tarfile.open(tmp_path / "00000.tar", "w") as shard:
        Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
        shard.add(tmp_path / "0.png", "0.png")
    (tmp_path / "0.png").unlink()
    for name in ("00000", "00001"):
        parquet.write_table(pyarrow.table({"key": ["0"], "caption": ["a cat"]}), tmp_path / f"{name}.parquet")
    assert [Path(one.source).name for one in images.find_images([tmp_path])] == ["00000.tar::0.png", "00001.parquet"]


def test_files_are_found_without_being_opened(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no shard")
    (tmp_path / "b.png").write_bytes(b"no picture")
    (tmp_path / "c.heic").write_bytes(b"")
    found = images.find_files([tmp_path, tmp_path / "b.png"])
    assert [(one.key, bool(one.problem)) for one in found] == [("a.tar", False), ("b.png", False), ("c.heic", True)]
    opened = [image.source for one in found for image in one.images()]
    assert opened == [one.source for one in images.find_images([tmp_path])]


def test_threads_that_decode_leave_warnings_as_they_were(tmp_path: Path) -> None:
    for number in range(8):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / f"{number}.png")
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(images.open_image, sorted(tmp_path.iterdir()) * 100))
    assert warnings.filters == before
    with pytest.warns(UserWarning, match="heard"):
        warnings.warn("heard", UserWarning, stacklevel=1)


def test_threads_that_want_the_same_row_group_read_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    content = encoded(Image.new("RGB", (4, 4)))
    parquet.write_table(pyarrow.table({"image": [content] * 40}), tmp_path / "t.parquet", row_group_size=40)
    reads: list[int] = []
    real = parquet.ParquetFile.read_row_group

    def counting(self: Any, group: int, **options: Any) -> Any:
        reads.append(group)
        time.sleep(0.02)
        return real(self, group, **options)

    monkeypatch.setattr(parquet.ParquetFile, "read_row_group", counting)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda one: one.load(), images.find_images([tmp_path])))
    assert reads == [0]
