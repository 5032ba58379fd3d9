"""A framed picture looks the same whatever margins it came with; nothing bleeds in from where nothing is seen."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from knn_diffusion import images
from knn_diffusion.errors import ImageError, UsageError

SIZE = 128


def art(width: int = 90, height: int = 60) -> Image.Image:
    """A drawing that fills its picture: a red ellipse with a blue block in it."""
    drawn = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    pen = ImageDraw.Draw(drawn)
    pen.ellipse((0, 0, width - 1, height - 1), fill=(220, 40, 30, 255))
    pen.rectangle((width // 4, height // 3, width // 2, height // 2), fill=(20, 60, 200, 255))
    return drawn


def laid(drawn: Image.Image, size: tuple[int, int], place: tuple[int, int]) -> Image.Image:
    picture = Image.new("RGBA", size, (0, 0, 0, 0))
    picture.paste(drawn, place)
    return picture


def alpha(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGBA"
    return np.asarray(image.getchannel("A")).astype(int)


def shown(image: Image.Image) -> list[int]:
    """The sides of what is visible: left, top, right, bottom."""
    rows, columns = np.nonzero(alpha(image) > 8)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


@pytest.mark.parametrize("place", [(0, 0), (300, 10), (155, 170), (310, 340)])
def test_margins_and_places_make_no_difference(place: tuple[int, int]) -> None:
    framed = images.frame(laid(art(), (400, 400), place), SIZE)
    assert framed.tobytes() == images.frame(art(), SIZE).tobytes()


def test_the_longer_side_takes_fifteen_sixteenths_and_the_rest_is_centred() -> None:
    framed = images.frame(art(90, 60), SIZE)
    assert (framed.mode, framed.size) == ("RGBA", (SIZE, SIZE))
    assert shown(framed) == [4, 24, 124, 104]
    assert shown(images.frame(art(60, 90), SIZE)) == [24, 4, 104, 124]
    assert shown(images.frame(art(90, 60), 64)) == [2, 12, 62, 52]


def test_sizes_of_the_same_drawing_are_framed_nearly_alike() -> None:
    small, large = (np.asarray(images.on_ground(images.frame(art(90 * n, 60 * n), SIZE)), float) for n in (2, 9))
    assert np.abs(small - large).mean() < 2


def test_framing_a_framed_picture_changes_nothing() -> None:
    for drawn in (art(90, 60), art(517, 1033), art(7, 5)):
        once = images.frame(drawn, SIZE)
        assert images.frame(once, SIZE).tobytes() == once.tobytes()


def test_a_picture_that_is_transparent_everywhere_is_refused() -> None:
    for level in (0, 8):
        with pytest.raises(ImageError) as caught:
            images.frame(Image.new("RGBA", (30, 20), (255, 0, 0, level)), SIZE)
        assert str(caught.value) == (
            "expected a picture with something to see, got 30 × 20 pixels that are all transparent (alpha of at most 8 of "
            "255): leave it out"
        )
    assert images.frame(Image.new("RGBA", (30, 20), (255, 0, 0, 9)), SIZE).mode == "RGBA"
    with pytest.raises(UsageError, match="at least 1 pixel, got 0"):
        images.frame(art(), 0)


def test_faint_noise_in_the_margins_does_not_count() -> None:
    noisy = np.array(laid(art(), (400, 300), (100, 50)))
    margin = noisy[..., 3] == 0
    noisy[margin] = np.random.default_rng(0).integers(0, 256, (int(margin.sum()), 4))
    noisy[margin, 3] %= 9
    framed = images.frame(Image.fromarray(noisy, "RGBA"), SIZE)
    assert shown(framed) == shown(images.frame(art(), SIZE))
    far = np.hypot(*(np.mgrid[-1:1:128j, -1:1:128j] * [[[1.5]], [[1.0]]])) > 1
    assert (alpha(framed)[far] == 0).all()


def test_one_pixel_and_very_long_drawings_are_framed() -> None:
    dot = images.frame(laid(Image.new("RGBA", (1, 1), (10, 20, 30, 255)), (50, 50), (49, 3)), SIZE)
    assert shown(dot) == [4, 4, 124, 124]
    assert np.asarray(dot)[64, 64].tolist() == [10, 20, 30, 255]
    line = images.frame(laid(Image.new("RGBA", (3000, 2), (10, 20, 30, 255)), (3000, 40), (0, 7)), SIZE)
    assert shown(line) == [4, 63, 124, 64]
    assert images.frame(Image.new("RGBA", (1, 1), (10, 20, 30, 200)), 1).getpixel((0, 0)) == (10, 20, 30, 200)


@pytest.mark.parametrize("hidden", [(0, 0, 0, 0), (255, 255, 255, 0), (0, 255, 0, 0)])
@pytest.mark.parametrize("side", [40, 330, 480])
def test_no_fringe_of_a_hidden_colour_appears(hidden: tuple[int, ...], side: int) -> None:
    picture = Image.new("RGBA", (side + 20, side + 20), hidden)  # type: ignore[arg-type]
    ImageDraw.Draw(picture).ellipse((10, 10, side + 9, side + 9), fill=(200, 100, 50, 255))
    framed = np.asarray(images.frame(picture, SIZE)).astype(int)
    edge = framed[(framed[..., 3] > 40) & (framed[..., 3] < 255)]
    assert len(edge) > 50
    assert np.abs(edge[:, :3] - [200, 100, 50]).max() <= 6


def test_resizing_is_antialiased_in_colour_and_alpha() -> None:
    y, x = np.mgrid[0:600, 0:600]
    checks = np.zeros((600, 600, 4), np.uint8)
    checks[(x + y) % 2 == 0] = (255, 0, 0, 255)
    checks[(0, -1), :] = checks[:, (0, -1)] = (255, 0, 0, 255)
    inside = np.asarray(images.frame(Image.fromarray(checks, "RGBA"), 100))[20:80, 20:80].astype(int)
    assert np.abs(inside[..., 3] - 127).max() <= 8
    assert (inside[..., 0] >= 250).all()


def test_an_opaque_picture_is_its_centred_square_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    for shape in ((300, 200), (64, 64), (7, 90), (1, 1)):
        photo = Image.fromarray(rng.integers(0, 256, (*shape, 3), np.uint8))
        framed = images.frame(photo, 64)
        assert framed.mode == "RGB"
        assert framed.tobytes() == images.square(photo, 64).tobytes()


def test_alpha_that_is_opaque_but_for_noise_is_no_transparency() -> None:
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    veiled = photo.copy()
    veiled.putalpha(247)
    assert not images.is_transparent(veiled)
    assert images.frame(veiled, 32).tobytes() == images.square(photo, 32).tobytes()
    veiled.putalpha(246)
    assert images.is_transparent(veiled)


@pytest.mark.parametrize("ground", [(255, 255, 255), (20, 90, 60)])
@pytest.mark.parametrize(("size", "place"), [((100, 70), (5, 5)), ((400, 300), (200, 100)), ((300, 600), (3, 500))])
def test_a_drawing_on_a_plain_ground_is_trimmed_as_one_on_none(
    ground: images.Colour, size: tuple[int, int], place: tuple[int, int]
) -> None:
    framed = images.frame(images.on_ground(laid(art(), size, place), ground), SIZE)
    assert framed.mode == "RGB"
    expected = images.on_ground(images.frame(art(), SIZE), ground)
    difference = np.abs(np.asarray(framed).astype(int) - np.asarray(expected))
    assert difference.mean() < 0.5
    assert framed.getpixel((0, 0)) == ground


def test_a_plain_ground_of_a_jpeg_is_recognised() -> None:
    rng = np.random.default_rng(0)
    picture = np.asarray(images.on_ground(laid(art(), (300, 300), (30, 170)), (250, 240, 230))).astype(int)
    noisy = Image.fromarray((picture + rng.integers(-4, 5, picture.shape)).clip(0, 255).astype(np.uint8))
    framed = images.frame(noisy, SIZE)
    assert np.abs(np.asarray(framed).astype(int)[64, 8] - [220, 40, 30]).max() <= 12


def test_photographs_blanks_and_specks_are_not_trimmed() -> None:
    blank = Image.new("RGB", (200, 100), (250, 250, 250))
    speck = blank.copy()
    speck.paste((0, 0, 0), (90, 40, 110, 55))
    touching = images.on_ground(laid(art(), (200, 100), (111, 3)))
    y, x = np.mgrid[0:100, 0:200]
    sky = Image.fromarray(np.stack([x * 0 + 90, 120 + y // 4, x * 0 + 230], -1).astype(np.uint8))
    for picture in (blank, speck, touching, sky):
        assert images.frame(picture, 50).tobytes() == images.square(picture, 50).tobytes()


def test_composing_on_a_ground_weighs_by_alpha() -> None:
    half = Image.new("RGBA", (2, 2), (200, 0, 0, 128))
    assert np.abs(np.subtract(images.on_ground(half, (0, 100, 200)).getpixel((0, 0)), (100, 50, 100))).max() <= 1
    opaque = Image.new("RGB", (2, 2), (1, 2, 3))
    assert images.on_ground(opaque, (0, 100, 200)).tobytes() == opaque.tobytes()


def test_white_art_is_shown_on_grey_and_everything_else_on_white() -> None:
    def ellipse(fill: images.Colour, outline: images.Colour | None = None) -> Image.Image:
        drawn = Image.new("RGBA", (300, 300), (0, 0, 0, 0))
        ImageDraw.Draw(drawn).ellipse((20, 60, 280, 240), fill=fill, outline=outline, width=12)
        return drawn

    for fill in ((255, 255, 255), (245, 248, 250)):
        assert images.showing_ground(ellipse(fill)) == (128, 128, 128)
    for fill in ((255, 255, 0), (200, 200, 200), (0, 0, 0), (128, 128, 128)):
        assert images.showing_ground(ellipse(fill)) == (255, 255, 255)
    assert images.showing_ground(ellipse((255, 255, 255), (60, 60, 60))) == (255, 255, 255)
    marked = ellipse((255, 255, 255))
    ImageDraw.Draw(marked).rectangle((100, 100, 200, 200), fill=(0, 0, 0, 255))
    assert images.showing_ground(marked) == (128, 128, 128)
    assert images.showing_ground(Image.new("RGBA", (40, 40), (0, 0, 0, 60))) == (255, 255, 255)
    assert images.showing_ground(Image.new("RGBA", (40, 40), (255, 255, 255, 60))) == (128, 128, 128)
    assert images.showing_ground(Image.new("RGB", (4, 4), "white")) == (255, 255, 255)
    cloud = np.asarray(images.on_ground(ellipse((255, 255, 255))))
    assert (cloud.min(), cloud.max()) == (128, 255)
