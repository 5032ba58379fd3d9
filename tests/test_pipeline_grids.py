"""A model that reads its neighbors' pictures: where their tokens come from, who leads, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_world import GRIDS, SIZE, build_model, draw_pictures, same_pixels

from knn_diffusion import ImageIndex, KnnDiffusion
from knn_diffusion.errors import UsageError
from knn_diffusion.images import network_input, pixels_from_uint8
from knn_diffusion.neighbor_tokens import NeighborTokens
from knn_diffusion.shapes import Condition


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KnnDiffusion]:
    place = tmp_path_factory.mktemp("world")
    made = KnnDiffusion.from_pretrained(build_model(place / "model", draw_pictures(place / "pictures"), **GRIDS))
    with torch.no_grad():
        for layer in (made.denoiser.grid_attention["0"].output, made.denoiser.local.leader):
            layer.weight.mul_(20)  # so that grids matter
    yield made
    made.index.close()


def test_grids_are_the_tokens_of_the_first_neighbors_previews(pipe: KnnDiffusion) -> None:
    condition, neighbors, _ = pipe.retrieve("a red heart", pipe._request({"k": 5}))
    assert condition.grids.shape == (1, 3, 16)
    assert condition.grids_present.all()
    for place, one in enumerate(neighbors[:3]):
        preview = pipe.index.preview(one.id)
        pixels = pixels_from_uint8(network_input(preview, SIZE, alpha=False)[None])
        assert torch.equal(condition.grids[0, place], pipe.tokenizer.encode(pixels)[0])


def test_each_image_is_led_by_another_neighbor_whatever_else_is_drawn(pipe: KnnDiffusion) -> None:
    four = pipe("a red heart", num_images_per_prompt=4)
    two = pipe("a red heart", num_images_per_prompt=2)
    first = pipe("a red heart", num_images_per_prompt=4, lead="first")
    assert (four.lead, first.lead) == ("rotate", "first")
    assert four.read == 3
    assert all(same_pixels(one, other) for one, other in zip(four.images, two.images, strict=False))
    alike = [same_pixels(one, other) for one, other in zip(four.images, first.images, strict=True)]
    assert alike[0]
    assert alike[3]  # the fourth begins anew
    assert not all(alike)


def test_an_index_without_pictures_as_large_as_the_models_gives_no_grids(pipe: KnnDiffusion, tmp_path: Path) -> None:
    bare = ImageIndex.build([draw_pictures(tmp_path)], None, pipe.model.encoder, previews=False)
    without = KnnDiffusion(pipe.model, bare)
    condition, *_ = without.retrieve("a red heart", without._request({}))
    assert not condition.grids_present.any()
    out = without("a red heart")
    assert out.read == 0
    assert out.facts()["read"] == 0
    tokens = NeighborTokens(pipe.tokenizer)
    for preview in (None, Image.new("RGB", (SIZE, SIZE - 1))):
        assert not tokens.read(["a"], 1, lambda _, shown=preview: shown)[1].any()
    assert tokens.read(["a"], 1, lambda _: Image.new("RGB", (SIZE, SIZE)))[1].all()


def test_an_image_is_tokenized_once(pipe: KnnDiffusion) -> None:
    asked: list[str] = []

    def preview(id_: str) -> Image.Image:
        asked.append(id_)
        return Image.new("RGB", (SIZE, SIZE), "red" if id_ == "a" else "blue")

    tokens = NeighborTokens(pipe.tokenizer)
    first, again = (tokens.read(["a", "b"], 3, preview) for _ in range(2))
    assert asked == ["a", "b"]
    assert torch.equal(first[0], again[0])
    assert first[1].tolist() == [[True, True, False]]


def test_neighbors_that_disagree_with_the_first_are_left_out_and_named(pipe: KnnDiffusion) -> None:
    every = pipe("a red heart", k=5)
    assert every.disagreeing == []
    strict = pipe("a red heart", k=5, agreement=1.0)
    assert strict.neighbors == every.neighbors[:1]
    assert [*strict.neighbors, *strict.disagreeing] == every.neighbors
    assert (strict.shortfall, strict.read, strict.agreement) == (0, 1, 1.0)
    condition, *_ = pipe.retrieve("a red heart", pipe._request({"k": 5, "agreement": 1.0}))
    assert condition.present.tolist() == [[True, True, False, False, False, False]]
    assert not condition.y[:, 2:].any()


def test_an_edit_is_led_by_its_reference(pipe: KnnDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = pipe.draw

    def draw(condition: Condition, *given: Any, **also: Any) -> Any:
        seen.append((condition, given))
        return real(condition, *given, **also)

    monkeypatch.setattr(pipe, "draw", draw)
    picture = Image.new("RGB", (SIZE, SIZE), (200, 30, 60))
    out = pipe.edit(picture, "a cat", strength=0.5)
    tokens = pipe.tokenizer.encode(pixels_from_uint8(np.asarray(picture)[None]))
    condition, (_, request, _) = seen[0]
    assert torch.equal(condition.grids[:, 0], tokens)
    assert request.lead == out.lead == "first"


def test_what_a_model_cannot_do_is_refused(pipe: KnnDiffusion, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="expected lead as rotate or first, got 'second': choose one"):
        pipe("a cat", lead="second")
    with pytest.raises(UsageError, match="expected agreement from 0 to 1, got 2: 0 leaves no neighbor out"):
        pipe("a cat", agreement=2)
    plain = KnnDiffusion(replace(pipe.model, denoiser=_plain(tmp_path)), pipe.index)
    assert plain("a cat").read is None
    with pytest.raises(UsageError, match="got rotate for a model that does not read its neighbors' pictures: leave it"):
        plain("a cat", lead="rotate")


def _plain(folder: Path) -> Any:
    return KnnDiffusion.from_pretrained(build_model(folder / "plain")).model.denoiser
