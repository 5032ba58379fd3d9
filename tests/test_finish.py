"""Drawings become stickers: size, ground, border and shadow; what enlarging keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from scipy.ndimage import distance_transform_edt

from knn_diffusion.errors import UsageError
from knn_diffusion.images import check_finish, finished, frame, resized
from knn_diffusion.images.outline import distance_to_shape, grown
from knn_diffusion.images.sticker import BORDER, placed


def disc(side: int, radius: float, centre: tuple[float, float] | None = None, fill: Any = (200, 30, 60)) -> Image.Image:
    """A disc on transparency, antialiased by counting eight by eight points in each pixel."""
    x, y = centre or (side / 2, side / 2)
    rows, columns = (np.mgrid[0 : 8 * side, 0 : 8 * side] + 0.5) / 8
    inside = np.hypot(columns - x, rows - y) < radius
    alpha = inside.reshape(side, 8, side, 8).mean((1, 3))
    picture = Image.new("RGBA", (side, side), (*fill, 0))
    picture.putalpha(Image.fromarray(np.rint(255 * alpha).astype(np.uint8)))
    return picture


def scribble(seed: int, side: int = 64) -> Image.Image:
    """Some overlapping ellipses and bars anywhere in the picture."""
    rng, picture = np.random.default_rng(seed), Image.new("RGBA", (side, side))
    pen = ImageDraw.Draw(picture)
    for _ in range(4):
        x, y = (int(v) for v in rng.integers(0, side - 12, 2))
        width, height = (int(v) for v in rng.integers(3, 24, 2))
        colour = (*(int(v) for v in rng.integers(0, 200, 3)), 255)
        (pen.ellipse if rng.random() < 0.5 else pen.rectangle)((x, y, x + width, y + height), fill=colour)
    return picture


def finish(image: Image.Image, **options: Any) -> Image.Image:
    return finished(image, check_finish(options))


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def solid_distance(alpha: np.ndarray) -> np.ndarray:
    """Distance of each pixel's centre to the nearest centre of a solid one."""
    return np.asarray(distance_transform_edt(alpha < 128))


def test_without_options_a_drawing_comes_back_as_it_is() -> None:
    for image in (disc(16, 5), Image.new("RGB", (16, 16), "red")):
        assert finish(image) is image
        assert finish(image, border=False, shadow=False, background="none", size=None) is image


@pytest.mark.parametrize("size", [16, 77, 512, 1300])
@pytest.mark.parametrize("options", [{}, {"border": True}, {"shadow": True, "border": 0.1}, {"background": "teal"}])
def test_the_result_is_a_square_of_the_size_that_was_asked_for(size: int, options: dict[str, Any]) -> None:
    assert finish(disc(32, 12), size=size, **options).size == (size, size)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(64, 200))
def test_what_is_transparent_stays_transparent(seed: int, size: int) -> None:
    image = scribble(seed)
    result = finish(image, size=size)
    assert result.mode == "RGBA"
    reach = 2 * size / 64 + 1  # a filter reaches two pixels of the drawing far
    far = distance_transform_edt(np.kron(levels(image)[..., 3] == 0, np.ones((4, 4), bool)))
    there = (
        np.asarray(Image.fromarray(far.astype(np.float32)).resize((size, size), Image.Resampling.NEAREST)) * size / 256
    )
    assert (levels(result)[..., 3][there > reach] == 0).all()


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), width=st.sampled_from([0.01, 0.03, 0.08]), size=st.sampled_from([96, 256]))
def test_a_border_surrounds_the_drawing_at_every_pixel_within_its_width(seed: int, width: float, size: int) -> None:
    checked, image = check_finish({"size": size, "border": width}), scribble(seed)
    art = levels(placed(image, checked, size))[..., 3]
    result = levels(finished(image, checked))
    near = solid_distance(art) <= width * size - 0.5
    assert (result[near][:, 3] >= 250).all()
    only_border = near & (art == 0)
    assert (result[only_border][:, :3] >= 250).all()
    rim = np.concatenate([result[0], result[-1], result[:, 0], result[:, -1]])[:, 3]
    assert rim.max() <= 140  # at most half a pixel of the border's soft edge


def test_the_border_of_a_disc_is_a_disc_that_much_larger() -> None:
    alpha = disc(96, 30.3, (47.6, 48.2)).getchannel("A")
    for width in (2.0, 7.5, 12.0):
        expected = levels(disc(96, 30.3 + width, (47.6, 48.2)).getchannel("A"))
        off = np.abs(levels(grown(alpha, width)) - expected)
        assert off.max() < 150  # of 255: not much more than half a pixel
        assert off.sum() / 255 < 0.2 * 2 * np.pi * (30.3 + width)  # a fifth of a pixel along the whole outline


def test_a_border_follows_a_slanted_edge_without_steps() -> None:
    rows, columns = (np.mgrid[0 : 8 * 96, 0 : 8 * 96] + 0.5) / 8
    alpha = (rows > 60 + 0.13 * columns).reshape(96, 8, 96, 8).mean((1, 3))
    outline = 1 - levels(grown(Image.fromarray(np.rint(255 * alpha).astype(np.uint8)), 10.0)) / 255
    place = outline.sum(0)[20:76]  # where each column's border begins
    line = np.polyval(np.polyfit(np.arange(56), place, 1), np.arange(56))
    assert np.abs(place - line).max() < 0.3


def test_distances_are_those_of_every_pixel_to_every_solid_one() -> None:
    alpha = (np.random.default_rng(0).random((24, 30)) < 0.04).astype(np.float32)
    nearest = distance_transform_edt(alpha < 0.5)
    np.testing.assert_allclose(distance_to_shape(alpha, 9.0), np.minimum(nearest - 0.5, 9.0), atol=1e-5)
    assert (distance_to_shape(np.zeros((5, 5), np.float32), 3.0) == 3.0).all()


def test_narrow_gaps_of_a_border_close_and_wide_ones_stay_open() -> None:
    for gap, closed in ((6, True), (40, False)):
        image = Image.new("RGBA", (128, 128))
        ImageDraw.Draw(image).rectangle((10, 10, 63 - gap // 2, 117), fill="red")
        ImageDraw.Draw(image).rectangle((64 + gap // 2, 10, 117, 117), fill="red")
        assert (finish(image, border=0.03).getpixel((64, 64))[3] == 255) == closed  # type: ignore[index]


@pytest.mark.parametrize("options", [{}, {"shadow": True}, {"background": "#102030"}])
def test_a_border_of_0_is_no_border(options: dict[str, Any]) -> None:
    plain = finish(disc(32, 12), size=100, **options)
    for none in (0, 0.0, False):
        assert np.array_equal(levels(finish(disc(32, 12), size=100, border=none, **options)), levels(plain))


def test_true_is_the_usual_border_which_a_framed_drawing_has_room_for() -> None:
    image = frame(disc(100, 20), 128)
    usual = check_finish({"border": True, "size": 512})
    assert usual == check_finish({"border": BORDER, "size": 512})
    assert placed(image, usual, 512).tobytes() == placed(image, check_finish({}), 512).tobytes()


def test_a_drawing_is_moved_and_made_smaller_only_as_far_as_its_border_needs() -> None:
    corner, full = disc(64, 10, (11, 12)), disc(64, 31.9)
    box = placed(corner, check_finish({"border": 0.05}), 64).getchannel("A").getbbox()
    assert box == (4, 4, 24, 24)  # the size stays; 3.2 pixels of border and half of one for its soft edge
    assert placed(corner, check_finish({}), 64).getchannel("A").getbbox() == (1, 2, 21, 22)
    left, top, right, bottom = placed(full, check_finish({"border": 0.05}), 64).getchannel("A").getbbox() or (
        0,
        0,
        0,
        0,
    )
    assert min(left, top, 64 - right, 64 - bottom) >= 3
    assert right - left >= 54


def test_white_art_gets_no_dark_edge() -> None:
    result = levels(finish(disc(32, 10, fill=(255, 255, 255)), size=200))
    assert (result[result[..., 3] > 0][:, :3] == 255).all()


def test_half_transparent_parts_keep_their_alpha() -> None:
    image = Image.new("RGBA", (32, 32), (0, 90, 200, 0))
    image.paste((0, 90, 200, 100), (8, 8, 24, 24))
    assert set(np.unique(levels(finish(image, size=128))[48:80, 48:80, 3])) == {100}


def test_crisp_is_nearer_to_the_truth_than_lanczos_on_flat_art() -> None:
    def drawing(side: int) -> Image.Image:
        picture = disc(side, side * 0.42, fill=(240, 190, 40))
        picture.alpha_composite(disc(side, side * 0.12, (side * 0.4, side * 0.45), fill=(40, 30, 80)))
        return picture

    small, truth = drawing(48), levels(drawing(192))

    def error(resampler: str) -> float:
        result = levels(finish(small, size=192, resampler=resampler))
        seen = [one[..., :3] * one[..., 3:] / 255 for one in (result, truth)]
        return float(np.square(seen[0] - seen[1]).mean() + np.square(result[..., 3] - truth[..., 3]).mean())

    assert error("crisp") < 0.5 * error("lanczos")
    assert error("auto") == error("crisp")


def test_opaque_drawings_are_enlarged_by_plain_lanczos_unless_asked() -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8))
    plain = image.resize((60, 60), Image.Resampling.LANCZOS)
    assert np.array_equal(levels(finish(image, size=60)), levels(plain))
    assert not np.array_equal(levels(finish(image, size=60, resampler="crisp")), levels(plain))
    assert finish(image, size=60).mode == "RGB"


def test_enlarging_never_leaves_the_range_of_the_surroundings() -> None:
    image = scribble(3)
    for channel in range(4):
        before, after = levels(image)[..., channel], levels(resized(image, 256, 256))[..., channel]
        if channel == 3:
            assert (after.min(), after.max()) == (before.min(), before.max())
        assert after.min() >= 0


def test_a_smaller_picture_weighs_colours_by_alpha() -> None:
    image = Image.new("RGBA", (32, 32), (0, 255, 0, 0))
    image.paste((250, 0, 0, 255), (0, 0, 16, 32))
    result = levels(finish(image, size=16))
    assert (result[result[..., 3] > 16][:, 1] == 0).all()


def test_a_background_lies_behind_the_drawing_and_makes_it_opaque() -> None:
    result = finish(disc(32, 10), size=64, background="teal", border=True)
    assert result.mode == "RGB"
    assert result.getpixel((0, 0)) == (0, 128, 128)
    assert result.getpixel((32, 32)) == (200, 30, 60)
    assert finish(disc(32, 10), background="#12ab34").getpixel((0, 0)) == (0x12, 0xAB, 0x34)


def test_a_shadow_lies_below_and_is_not_cut_off() -> None:
    plain, shaded = (levels(finish(disc(64, 31), size=256, shadow=one))[..., 3] for one in (False, True))
    assert shaded[-1].max() <= 8
    assert max(shaded[0].max(), shaded[:, 0].max(), shaded[:, -1].max()) <= 8
    seen = np.flatnonzero(shaded.max(1) > 8)
    middle = np.flatnonzero(shaded.max(1) == 255)
    assert (middle[0] - seen[0]) < (seen[-1] - middle[-1])
    assert plain[0].max() == 0 or plain.max() == 255


def test_a_border_around_an_opaque_drawing_frames_its_square() -> None:
    result = finish(Image.new("RGB", (64, 64), "red"), size=128, border=0.05)
    assert (result.mode, result.getpixel((64, 64)), result.getpixel((64, 3))) == (
        "RGBA", (255, 0, 0, 255), (255, 255, 255, 255)
    )  # fmt: skip
    assert result.getpixel((0, 0))[3] < 128  # type: ignore[index]


@pytest.mark.parametrize(
    "options", [{"background": "teal"}, {"background": "transparent"}, {"background": "red", "size": 64}]
)
def test_a_ground_that_nobody_would_see_is_refused(options: dict[str, Any]) -> None:
    for opaque in (Image.new("RGB", (32, 32)), Image.new("RGBA", (32, 32))):
        opaque.putalpha(255) if opaque.mode == "RGBA" else None
        with pytest.raises(UsageError, match="expected drawings with transparency for a background, got opaque ones"):
            finish(opaque, **options)


def test_a_transparent_background_is_what_was_drawn() -> None:
    image = disc(32, 10)
    assert np.array_equal(levels(finish(image, background="transparent", size=64)), levels(finish(image, size=64)))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"size": 15}, "expected size from 16 to 4096 pixels, got 15"),
        ({"size": 4097}, "got 4097"),
        ({"size": 99.5}, "got 99.5"),
        ({"border": 0.3}, "expected a border from 0 to 0.2 of the side, got 0.3"),
        ({"border": -1}, "got -1"),
        ({"border": float("nan")}, "got nan"),
        ({"background": "blurple"}, "a CSS colour name or #rrggbb, got 'blurple'"),
        ({"background": "#12345678"}, "got '#12345678'"),
        ({"resampler": "cubic"}, "expected resampler as one of auto, crisp, lanczos, got 'cubic'"),
    ],
)
def test_an_impossible_option_is_wrong_use(options: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text):
        check_finish(options)


def test_an_option_that_does_not_exist_is_named() -> None:
    with pytest.raises(TypeError, match="unknown option 'colour'"):
        check_finish({"colour": "red"})  # type: ignore[typeddict-unknown-key]


def test_facts_hold_what_is_not_left_as_drawn() -> None:
    assert check_finish({}).facts() == {}
    everything = check_finish({"size": 512, "background": "teal", "border": True, "shadow": True})
    assert everything.facts() == {"size": 512, "background": "#008080", "border": 0.03, "shadow": True}
