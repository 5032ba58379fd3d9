"""Drawings as SVG: what the file holds, and what a viewer shows of it."""

from __future__ import annotations

import io
import json
import sys
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from test_finish import disc, levels, scribble, solid_distance

from knn_diffusion.errors import MissingDependencyError, UsageError
from knn_diffusion.images import check_finish, finished, traced
from knn_diffusion.images.sticker import placed

pytest.importorskip("vtracer")

SPACE = "{http://www.w3.org/2000/svg}"
PROMPT = 'a "<script>" & \x00\x1b ]]> --> ♥ \ud800 cat'


def svg(image: Image.Image, settings: dict[str, Any] | None = None, **options: Any) -> str:
    return traced(image, check_finish(options), settings)  # type: ignore[typeddict-item]


def shown(text: str, side: int) -> Image.Image:
    resvg = pytest.importorskip("resvg_py")
    content = bytes(resvg.svg_to_bytes(svg_string=text, width=side, height=side))
    return Image.open(io.BytesIO(content)).convert("RGBA")


def face() -> Image.Image:
    picture = disc(128, 55, fill=(240, 190, 40))
    for x in (45, 83):
        picture.alpha_composite(disc(128, 9, (x, 55), fill=(40, 30, 80)))
    return picture


def test_an_svg_is_small_valid_and_holds_nothing_but_shapes() -> None:
    text = svg(face(), {"prompt": PROMPT}, border=True, shadow=True, background="teal")
    assert text.isascii()
    assert len(text) < 10_000
    tags = {element.tag.removeprefix(SPACE) for element in ElementTree.fromstring(text).iter()}
    assert tags == {"svg", "metadata", "rect", "filter", "feGaussianBlur", "g", "path"}
    assert "href" not in text
    assert "<script" not in text


def test_settings_stand_in_the_metadata_whatever_the_prompt_is() -> None:
    root = ElementTree.fromstring(svg(face(), {"prompt": PROMPT, "seed": 3}))
    metadata = root.find(f"{SPACE}metadata")
    assert metadata is not None
    assert json.loads(metadata.text or "") == {"prompt": PROMPT, "seed": 3}
    assert ElementTree.fromstring(svg(face())).find(f"{SPACE}metadata") is None


def test_ground_border_and_drawing_lie_in_this_order() -> None:
    root = ElementTree.fromstring(svg(face(), border=True, background="teal"))
    names = [(child.tag.removeprefix(SPACE), child.get("fill")) for child in root]
    assert names[:2] == [("rect", "#008080"), ("g", "#ffffff")]
    assert {name for name, _ in names[2:]} == {"path"}


def test_the_size_is_the_viewers_first_guess_only() -> None:
    root = ElementTree.fromstring(svg(face(), size=300))
    assert (root.get("width"), root.get("height"), root.get("viewBox")) == ("300", "300", "0 0 512 512")
    assert ElementTree.fromstring(svg(face())).get("width") == "128"


@pytest.mark.parametrize("options", [{}, {"border": 0.05}, {"border": 0.05, "background": "teal"}, {"shadow": True}])
def test_an_svg_looks_like_the_finished_picture(options: dict[str, Any]) -> None:
    result = shown(svg(face(), **options), 512)
    truth = finished(face(), check_finish({"size": 512, **options})).convert("RGBA")  # type: ignore[typeddict-item]
    paper = [Image.alpha_composite(Image.new("RGBA", (512, 512), "grey"), one) for one in (result, truth)]
    assert np.abs(levels(paper[0]) - levels(paper[1])).mean() < 2


def test_a_traced_border_surrounds_the_drawing() -> None:
    checked, image = check_finish({"size": 512, "border": 0.03}), scribble(5, 128)
    result = levels(shown(traced(image, checked), 512))
    near = solid_distance(levels(placed(image, checked, 512))[..., 3]) <= 0.03 * 512 - 2
    assert (result[near][:, 3] >= 250).all()


def test_flat_colours_are_kept() -> None:
    result = shown(svg(face()), 512)
    for place, colour in (((256, 420), (240, 190, 40)), ((180, 220), (40, 30, 80))):
        assert np.abs(np.subtract(result.getpixel(place)[:3], colour)).max() <= 4  # type: ignore[index]
    assert result.getpixel((2, 2))[3] == 0  # type: ignore[index]


def test_an_opaque_drawing_is_traced_with_its_ground() -> None:
    image = Image.alpha_composite(Image.new("RGBA", (128, 128), (20, 90, 160, 255)), face()).convert("RGB")
    assert shown(svg(image), 128).getpixel((2, 2)) == pytest.approx((20, 90, 160, 255), abs=4)
    with pytest.raises(UsageError, match="got opaque ones"):
        svg(image, background="teal")


def test_a_drawing_of_nothing_is_an_empty_svg() -> None:
    assert "<path" not in svg(Image.new("RGBA", (64, 64)), border=True)


def test_the_same_drawing_gives_the_same_svg() -> None:
    assert svg(scribble(1), border=True) == svg(scribble(1), border=True)


def test_without_vtracer_the_line_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vtracer", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'knn-diffusion\[svg\]'"):
        svg(face())
