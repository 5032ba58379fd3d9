"""What is odd about an image is said, and the image is used; what cannot be used is refused with the reason."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage
from test_image_index import ENCODER, picture, sticker

from knn_diffusion import images
from knn_diffusion.image_index import ImageIndex
from knn_diffusion.image_index.hints import HINTS, Hint, Hinted, _parts, hints_of, num_parts

RED = (220, 30, 30)


def hints(image: Image.Image) -> tuple[Hint, ...]:
    return hints_of(image, images.frame(image, 128))


def sheet(rows: int, columns: int, cell: int = 100) -> Image.Image:
    """Discs of slightly different sizes, row by row, on nothing."""
    drawn = Image.new("RGBA", (columns * cell, rows * cell), (0, 0, 0, 0))
    pen = ImageDraw.Draw(drawn)
    for row, column in itertools.product(range(rows), range(columns)):
        margin = 6 + 5 * ((row + column) % 3)
        box = [column * cell + margin, row * cell + margin, (column + 1) * cell - margin, (row + 1) * cell - margin]
        pen.ellipse(box, fill=(200, 40 * row % 255, 30, 255))
    return drawn


@pytest.mark.parametrize("seed", range(6))
def test_parts_are_those_of_another_implementation(seed: int) -> None:
    drawn = np.random.default_rng(seed).random((30, 40)) < 0.15 + 0.1 * seed
    labels, expected = _parts(drawn), ndimage.label(drawn, np.ones((3, 3)))[0]
    pairs = {(int(one), int(other)) for one, other in zip(labels[drawn], expected[drawn], strict=True)}
    assert len(pairs) == len({one for one, _ in pairs}) == len({other for _, other in pairs}) == expected.max()


def test_a_spiral_is_one_part() -> None:
    turns = np.linspace(0, 4, 400)
    places = 128 + (8 + 28 * turns[:, None]) * np.stack([np.cos(turns * 2 * np.pi), np.sin(turns * 2 * np.pi)], 1)
    spiral = Image.new("RGBA", (256, 256), (0, 0, 0, 0))
    ImageDraw.Draw(spiral).line([tuple(place) for place in places.tolist()], fill=(*RED, 255), width=5)
    assert num_parts(images.frame(spiral, 128)) == 1


@pytest.mark.parametrize(("rows", "columns"), [(2, 2), (1, 4), (3, 4), (6, 5)])
def test_a_sheet_of_stickers_is_noticed(rows: int, columns: int) -> None:
    drawn = sheet(rows, columns)
    assert num_parts(images.frame(drawn, 128)) == rows * columns
    assert hints(drawn) == ("sheet",)
    assert hints(images.on_ground(drawn, (240, 240, 200))) == ("sheet",)


def test_one_sticker_with_small_parts_beside_it_is_no_sheet() -> None:
    drawn = sticker(RED).resize((600, 400), Image.Resampling.NEAREST)
    for x in range(20, 300, 30):
        drawn.paste((0, 0, 200, 255), (x, 20, x + 12, 32))
    assert hints(drawn) == ()


def test_animations_small_and_cropped_pictures_are_noticed(tmp_path: Path) -> None:
    frames = [picture(seed, 64) for seed in range(2)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert hints(images.open_image(tmp_path / "moving.gif")) == ("first_of_several",)
    pixel_art = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    pixel_art.paste((*RED, 255), (2, 2, 14, 10))
    far_away = Image.new("RGBA", (600, 600), (0, 0, 0, 0))
    far_away.paste((*RED, 255), (300, 300, 331, 320))
    for small in (pixel_art, far_away, picture(1, 16)):
        assert hints(small) == ("small",)
    photo = picture(1, 400).crop((0, 0, 400, 300))
    assert hints(photo) == ("cropped",)
    assert hints(photo.crop((0, 0, 300, 300))) == ()
    assert hints(images.on_ground(sheet(1, 1).resize((200, 50)), (240, 240, 240))) == ()


def test_an_index_counts_what_is_odd_and_uses_it(tmp_path: Path) -> None:
    folder = tmp_path / "art"
    folder.mkdir()
    frames = [picture(seed, 64) for seed in range(2)]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:])
    frames[1].save(folder / "b.gif", save_all=True, append_images=frames[:1])
    picture(2, 16).save(folder / "c.png")
    sheet(3, 3).save(folder / "d.png")
    picture(3, 16).resize((12_000, 1_000)).save(folder / "e.png")
    with (folder / "f.png").open("wb") as file:
        Image.new("1", (12_000, 12_000)).save(file)
    sticker(RED).save(folder / "g.png")
    with ImageIndex.build([folder], None, ENCODER) as index:
        assert index.report is not None
        assert index.report.added == len(index) == 6
        assert [Path(one.source).name for one in index.report.skipped] == ["f.png"]
        assert "expected at most 64 megapixels" in index.report.skipped[0].reason
        assert index.report.hints == {
            "first_of_several": Hinted(count=2, first=str(folder / "a.gif")),
            "small": Hinted(count=1, first=str(folder / "c.png")),
            "sheet": Hinted(count=1, first=str(folder / "d.png")),
            "cropped": Hinted(count=1, first=str(folder / "e.png")),
        }
        again = index.add([folder])
        assert (again.added, again.hints) == (0, {})
    assert HINTS.keys() == index.report.hints.keys()
