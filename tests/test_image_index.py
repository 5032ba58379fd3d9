"""An index of images: build, open, add, remove, search, check — and whatever happens, what was added stays."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from PIL import Image, ImageDraw

from knn_diffusion import images
from knn_diffusion.errors import FingerprintError, ImageError, KnnDiffusionError, StoreError, UsageError
from knn_diffusion.image_index import AddReport, ImageIndex, content_digest, embedding, ingest, shared
from knn_diffusion.image_index import encoder as encoder_module
from knn_diffusion.image_index.exclusion import per_query
from knn_diffusion.image_index.queries import as_texts, as_vectors
from knn_diffusion.images import SourceImage
from knn_diffusion.retrieval.dedup import OFF, DedupConfig
from knn_diffusion.retrieval.index import _check_request, require_one_each
from knn_diffusion.retrieval.items import preview_crc
from knn_diffusion.retrieval.neighbors import self_neighbors
from knn_diffusion.retrieval.plan import IndexConfig, Reach
from knn_diffusion.retrieval.store import Store

NAMES = {
    "red": (220, 30, 30),
    "green": (30, 190, 60),
    "blue": (40, 60, 220),
    "yellow": (240, 220, 40),
    "white": (255, 255, 255),
}


class ColourEncoder:
    """Average colours on a 4 × 4 grid; a text is the colour it names."""

    def __init__(self, name: str = "colours", fingerprint: str = "c0ffee" * 4) -> None:
        self.name, self.fingerprint, self.dim = name, fingerprint, 48

    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        cells = [np.asarray(image.convert("RGB").resize((4, 4), Image.Resampling.BOX), np.float32) for image in images]
        return self._unit(np.stack(cells).reshape(len(images), -1))

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        colours = [next(rgb for name, rgb in NAMES.items() if name in text) for text in texts]
        return self._unit(np.tile(np.array(colours, np.float32), (1, 16)))

    def _unit(self, rows: np.ndarray) -> np.ndarray:
        centred = rows - 127.6
        return (centred / np.linalg.norm(centred, axis=1, keepdims=True)).astype(np.float32)


ENCODER = ColourEncoder()


def picture(seed: int, size: int = 20) -> Image.Image:
    """A colour from a few, with its own pattern of cells."""
    random = np.random.default_rng(seed)
    cells = np.array(list(NAMES.values())[seed % 4]) + random.integers(-90, 90, (4, 4, 3))
    return Image.fromarray(cells.clip(0, 255).astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)


def sticker(colour: tuple[int, int, int]) -> Image.Image:
    """A disc with a hole, on nothing, off centre."""
    drawn = Image.new("RGBA", (150, 100), (0, 0, 0, 0))
    ImageDraw.Draw(drawn).ellipse((80, 10, 140, 70), fill=(*colour, 255))
    ImageDraw.Draw(drawn).ellipse((100, 30, 120, 50), fill=(0, 0, 0, 0))
    return drawn


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, rgb in NAMES.items():
        Image.new("RGB", (24, 18), rgb).save(folder / f"{name}.png")
    for seed in range(6):
        picture(seed).save(folder / f"pattern{seed}.png")
    return folder


def id_of(image: Image.Image) -> str:
    return content_digest(image)[:16]


def test_build_search_reopen(photos: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    with ImageIndex.build([photos], tmp_path / "index", ENCODER, progress=lambda *one: told.append(one)) as index:
        assert index.report is not None
        assert index.report == AddReport(added=11, ids=index.ids, hints=index.report.hints)
        assert told[-1] == ("adding images", 11, 11)
        assert len(index) == 11
    with ImageIndex.open(tmp_path / "index", ENCODER) as index:
        found = index.search_text("a red thing", 3)
        assert index.source(found.ids[0][0]) == str(photos / "red.png")
        assert index.search_text(["green", "blue"], 1).ids == [
            [id_of(Image.new("RGB", (24, 18), NAMES[n]))] for n in ("green", "blue")
        ]
        own = index.search_image(photos / "pattern3.png", 1)
        assert own.ids[0][0] == id_of(picture(3))
        assert own.scores[0, 0] == pytest.approx(1, abs=1e-3)
        assert index.sources(own.ids[0]) == [str(photos / "pattern3.png")]
        assert id_of(picture(3)) in index
        assert "nobody" not in index
        index.check()


def test_facts_say_what_the_index_is(photos: Path, tmp_path: Path) -> None:
    with ImageIndex.build([photos], tmp_path / "index", ENCODER) as index:
        facts = index.info()
        assert (facts["count"], facts["dim"], facts["encoder"], facts["engine"]) == (11, 48, "colours", "exact")
        assert facts["fingerprint"] == ENCODER.fingerprint
        assert facts["bytes"] > 10_000
        assert facts["read_only"] is False
        assert index.embeddings.shape == (11, 48)
        assert index.embeddings.dtype == np.float16


def test_previews_are_framed_pictures_and_optional() -> None:
    photo, drawn = picture(2, 400).crop((0, 0, 400, 200)), sticker(NAMES["red"])
    with ImageIndex.build([photo, drawn], None, ENCODER) as index:
        for one, mode in ((photo, "RGB"), (drawn, "RGBA")):
            shown = index.preview(id_of(one))
            assert shown is not None
            assert (shown.mode, shown.size) == (mode, (128, 128))
            expected, seen = (images.on_ground(each, (0, 0, 0)) for each in (images.frame(one, 128), shown))
            assert np.abs(np.asarray(seen).astype(int) - np.asarray(expected)).mean() < 6
        shown = index.preview(id_of(drawn))
        assert shown is not None
        assert shown.getchannel("A").tobytes() == images.frame(drawn, 128).getchannel("A").tobytes()
        index.add([picture(1)], previews=False)
        assert index.preview(id_of(picture(1))) is None
        with pytest.raises(
            UsageError, match="expected the id of an image in the index in memory, got 'x': search to see its ids"
        ):
            index.preview("x")


def edited(folder: Path, statement: str, values: tuple[object, ...] = ()) -> None:
    """Change the database of an index as another program might write it."""
    with Store.open(folder) as store, store.live.transaction() as change:
        change.database.execute(statement, values)


def test_an_index_of_before_keeps_the_size_of_its_previews(tmp_path: Path) -> None:
    ImageIndex.build([picture(1)], tmp_path / "index", ENCODER).close()
    edited(tmp_path / "index", "DELETE FROM settings WHERE name IN ('framing', 'preview_side')")
    with ImageIndex.open(tmp_path / "index", ENCODER) as index:
        index.add([sticker(NAMES["blue"])])
        shown = index.preview(id_of(sticker(NAMES["blue"])))
        assert shown is not None
        assert shown.size == (64, 64)
        assert (index.info()["framing"], index.info()["preview_side"]) == (None, 64)


def webp(size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "WEBP")
    return buffer.getvalue()


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (png(), "cannot be decoded"),
        (webp((129, 20)), "it is 129 × 20"),
        (webp((64, 64))[:40], "cannot be decoded"),
        (b"no picture", "cannot be decoded"),
    ],
)
def test_what_is_no_preview_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    ImageIndex.build([picture(1)], tmp_path / "index", ENCODER).close()
    edited(tmp_path / "index", "UPDATE previews SET picture = ?, crc32 = ?", (content, preview_crc(0, content)))
    with (
        ImageIndex.open(tmp_path / "index", ENCODER) as index,
        pytest.raises(StoreError, match="expected a preview in WebP of at most 128 pixels") as caught,
    ):
        index.preview(index.ids[0])
    assert problem in str(caught.value)


@pytest.mark.parametrize("side", ["0", "1025", "many", "-3", ""])
def test_a_size_of_previews_that_cannot_be_is_refused(tmp_path: Path, side: str) -> None:
    ImageIndex.build([picture(1)], tmp_path / "index", ENCODER).close()
    edited(tmp_path / "index", "UPDATE settings SET value = ? WHERE name = 'preview_side'", (side,))
    with (
        ImageIndex.open(tmp_path / "index", ENCODER) as index,
        pytest.raises(StoreError, match="expected previews of 1 to 1024 pixels, its setting says"),
    ):
        index.preview(index.ids[0])


def test_white_art_is_no_copy_of_a_blank() -> None:
    blank, square, disc = (
        Image.new("RGB", (64, 64), "white"),
        *(Image.new("RGBA", (64, 64), (0, 0, 0, 0)) for _ in "ab"),
    )
    square.paste((255, 255, 255, 255), (4, 4, 60, 60))
    ImageDraw.Draw(disc).ellipse((4, 4, 60, 60), fill=(255, 255, 255, 255))
    alike = ColourEncoder()
    alike.encode_images = lambda images: alike.encode_texts(["white"] * len(images))  # type: ignore[method-assign]
    with ImageIndex.build([blank, square, disc], None, alike, rule=DedupConfig(cosine=None, manhattan=8.0)) as index:
        assert len(index) == 3
        assert len(index.search_text("white", 3).ids[0]) == 3
        assert index.search_text("white", 3).shortfall.tolist() == [0]


def test_what_is_transparent_everywhere_is_listed_as_unusable() -> None:
    nothing = Image.new("RGBA", (20, 20), (200, 0, 0, 3))
    with ImageIndex.build([picture(1), nothing], None, ENCODER) as index:
        assert index.report is not None
        assert [(one.source, "all transparent" in one.reason) for one in index.report.skipped] == [("picture 1", True)]
        assert len(index) == 1


def test_images_that_cannot_be_used_are_listed_and_the_rest_is_added(photos: Path, tmp_path: Path) -> None:
    (photos / "a-text.png").write_text("no picture")
    (photos / "b-empty.jpg").touch()
    whole = (photos / "red.png").read_bytes()
    (photos / "c-cut.png").write_bytes(whole[: len(whole) // 2])
    with ImageIndex.build([photos], tmp_path / "index", ENCODER) as index:
        assert index.report is not None
        assert index.report.added == 11
        assert [Path(one.source).name for one in index.report.skipped] == ["a-text.png", "b-empty.jpg", "c-cut.png"]
        assert all(one.reason and "\n" not in one.reason for one in index.report.skipped)


class Choosy(ColourEncoder):
    """An encoder that cannot place pictures of 7 pixels."""

    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        rows = super().encode_images(images)
        rows[[image.width == 7 for image in images]] = np.nan
        return rows


def test_an_image_that_the_encoder_cannot_place_is_listed() -> None:
    with ImageIndex.build([picture(0), picture(1, 7), picture(2)], None, Choosy()) as index:
        assert index.report is not None
        assert index.report.added == 2
        assert index.report.skipped[0].reason == "the encoder gives no usable vector for it"


def test_the_same_picture_is_added_once_whatever_its_file(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    picture(1).save(tmp_path / "b.bmp")
    with ImageIndex.build([tmp_path], None, ENCODER) as index:
        assert index.report is not None
        assert (index.report.added, index.report.already_present) == (1, 1)
        report = index.add([picture(1), picture(2), picture(2)])
        assert (report.added, report.already_present, report.ids) == (1, 2, [id_of(picture(2))])


def test_nothing_usable_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(
        ImageError, match=r"none of 1 images could be used \(first: .*a.png: .*\): mend or replace them"
    ):
        ImageIndex.build([tmp_path / "a.png"], tmp_path / "index", ENCODER)
    assert not (tmp_path / "index").exists()
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UsageError, match="found none in"):
        ImageIndex.build([tmp_path / "nothing"], tmp_path / "index", ENCODER)
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_copy_of_an_image_that_cannot_be_used_is_none_that_can(tmp_path: Path, in_memory: bool) -> None:
    place, images = None if in_memory else tmp_path / "index", [picture(1, 7), picture(1, 7)]
    with pytest.raises(ImageError, match=r"none of 2 images could be used \(first: picture 0: the encoder gives no"):
        ImageIndex.build(images, place, Choosy())
    assert not (tmp_path / "index").exists()


def test_an_index_is_not_built_over_another(photos: Path, tmp_path: Path) -> None:
    ImageIndex.build([photos], tmp_path / "index", ENCODER).close()
    with pytest.raises(UsageError, match="index exists: choose another or add to the index there"):
        ImageIndex.build([photos], tmp_path / "index", ENCODER)


def test_an_index_of_another_encoder_is_refused(photos: Path, tmp_path: Path) -> None:
    ImageIndex.build([photos], tmp_path / "index", ENCODER).close()
    text = (
        r"index was built with colours \(48-d, c0ffeec0ffee\), the encoder is clip \(48-d, 0123\): "
        "load that encoder or build the index again"
    )
    with pytest.raises(FingerprintError, match=text):
        ImageIndex.open(tmp_path / "index", ColourEncoder("clip", "0123"))


def test_the_encoder_is_loaded_by_where_it_was_or_by_its_name(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def load(place: str | Path, *, network: bool = False) -> ColourEncoder:
        asked.append(str(place))
        assert not network
        return ColourEncoder()

    monkeypatch.setattr(encoder_module, "load_encoder", load)
    ImageIndex.build([photos], tmp_path / "one", ENCODER).close()
    (tmp_path / "kept").mkdir()
    ImageIndex.build([photos], tmp_path / "two", tmp_path / "kept").close()
    for place in ("one", "two"):
        with ImageIndex.open(tmp_path / place) as index:
            assert len(index) == 11
            index.search_text("red", 1)
    assert asked == [str(tmp_path / "kept"), "colours", str(tmp_path / "kept")]
    (tmp_path / "encoder").mkdir()
    with ImageIndex.open(tmp_path / "one") as index:
        index.search_text("red", 1)
    assert asked[3:] == [str(tmp_path / "encoder")]


@pytest.mark.parametrize("k", [0, 12])
def test_an_impossible_k_is_refused(photos: Path, k: int) -> None:
    text = f"k must be between 1 and 11, .* got {k}: change k or add images"
    with ImageIndex.build([photos], None, ENCODER) as index, pytest.raises(UsageError, match=text):
        index.search_text("red", k)


@pytest.mark.parametrize("k", ["2", 2.0, None, True])
def test_a_k_that_is_no_whole_number_is_refused(k: Any) -> None:
    with pytest.raises(UsageError, match=f"k must be a whole number between 1 and 5, got {k!r}: change k"):
        _check_request("the index", 5, 1, k, None)


AS_HANDED = {
    "float64": lambda rows: rows.astype(np.float64),
    "float16": lambda rows: rows.astype(np.float16),
    "a list": lambda rows: rows.tolist(),
    "a tuple of arrays": tuple,
    "a tensor": torch.from_numpy,
    "a tensor that learns": lambda rows: torch.from_numpy(rows).requires_grad_(),
    "a tensor of bfloat16": lambda rows: torch.from_numpy(rows).bfloat16(),
}


@pytest.mark.parametrize("kind", AS_HANDED)
def test_vectors_may_come_as_any_numbers_and_one_alone(photos: Path, kind: str) -> None:
    handed = AS_HANDED[kind]
    with ImageIndex.build([photos], None, ENCODER, rule=OFF) as index:
        rows = index.embeddings[:2].astype(np.float32)
        expected = index.search(rows, 1).ids
        assert index.search(handed(rows), 1).ids == expected
        assert index.search(handed(rows[:1])[0], 1).ids == expected[:1]


@pytest.mark.parametrize(
    "queries", ["red", None, 5.0, [["a"]], [[1.0, 2.0], [3.0]], np.ones((1, 1, 48)), {"a": 1}, [None]]
)
def test_what_is_no_vector_is_refused_in_a_line(queries: Any) -> None:
    with pytest.raises(UsageError, match=r"expected vectors of numbers, one or a row for each query, got .*: encode"):
        as_vectors(queries)


@pytest.mark.parametrize("text", [None, b"red", 5, ["red", None], "red \udcff", ["red", "\ud800"]])
def test_what_is_no_text_is_refused_in_a_line(text: Any) -> None:
    with pytest.raises(UsageError, match=r"expected (a text in UTF-8|texts to search by), got "):
        as_texts(text)


def test_one_id_is_no_list_of_ids(photos: Path) -> None:
    with ImageIndex.build([photos], None, ENCODER, rule=OFF) as index:
        first = index.ids[0]
        rows = index.embeddings[:2].astype(np.float32)
        assert per_query(np.array([first]), 2) == per_query(iter([first]), 2) == [[first], [first]]
        for excluded in (first, [first, [first]], [[first], first], 5, [5]):
            with pytest.raises(
                UsageError, match=r"expected exclude_ids as ids, or for each query a list of ids, got .*: put"
            ):
                per_query(excluded, 2)
        for excluded in (first, [first, first]):
            with pytest.raises(UsageError, match=r"exclude_ids needs a list of ids for each query"):
                require_one_each(excluded, 2)
        for call in (index.sources, index.metadata, index.remove):
            with pytest.raises(UsageError, match=r"expected a list of ids, got the text '"):
                call(first)
        for excluded in ([first], {first}, (first,), [[first], [first]]):
            assert all(first not in ids for ids in index.search(rows, 10, exclude_ids=excluded).ids)


def test_exclusion_and_conditions_reach_the_search(photos: Path) -> None:
    with ImageIndex.build([photos], None, ENCODER, rule=OFF) as index:
        first, second = index.search_text("red", 2).ids[0]
        assert index.search_text("red", 1, exclude_ids=(first,)).ids == [[second]]
        assert index.search_text(["red", "red"], 1, exclude_ids=[[first], []]).ids == [[second], [first]]
        assert index.source(index.search_text("red", 1, where="key LIKE '%blue%'").ids[0][0]).endswith("blue.png")


def test_duplicates_are_found_when_asked_for() -> None:
    images = [picture(3), picture(3, 24), picture(4)]
    with ImageIndex.build(images, None, ENCODER, rule=DedupConfig(cosine=0.99, manhattan=None)) as index:
        query = ENCODER.encode_images([picture(3)])
        assert index.search(query, 2).ids[0] == [id_of(images[0]), id_of(images[2])]
        assert set(index.search(query, 2, deduplicate=False).ids[0]) == {id_of(images[0]), id_of(images[1])}


def test_training_neighbors_are_rows_of_the_embeddings() -> None:
    images = [picture(n) for n in range(30)]
    with ImageIndex.build(images, None, ENCODER, rule=DedupConfig(cosine=0.99, manhattan=None)) as index:
        index.remove([id_of(images[4])])
        table, rows = index.embeddings.astype(np.float32), index.frozen().self_neighbors(3)
        ids = index.ids
        assert rows.shape == (29, 3)
        assert not (rows == np.arange(29)[:, None]).any()
        found = index.frozen().neighbor_places(table, 3, np.arange(29))
        np.testing.assert_array_equal(found, rows)
        best = index.search(table[7:8], 1, exclude_ids=[ids[7]]).ids[0][0]
        assert ids[rows[7, 0]] == best
        index.set_rule(OFF)
        assert index.frozen().neighbor_places(table[:3], 1, np.array([0, -1, 7]))[:, 0].tolist()[1:] == [1, 2]
        assert (
            index.frozen().neighbor_places(table[:1], 1, np.array([0]))[0, 0]
            != 0
            == index.frozen().neighbor_places(table[:1], 1)[0, 0]
        )


def test_a_table_of_embeddings_stays_what_it_was(photos: Path, tmp_path: Path) -> None:
    with ImageIndex.build([photos], tmp_path / "index", ENCODER) as index:
        before, table = index.embeddings, index.frozen()
        index.remove(index.ids[:3])
        index.add([picture(40)])
        index.compact()
        assert len(table) == len(before) == 11
        np.testing.assert_array_equal(table[np.arange(11)], before)
        places = np.array([[3, 0], [10, 3]])
        np.testing.assert_array_equal(table[places], before[places])
        now = index.frozen()
        assert len(now) == 9
        np.testing.assert_array_equal(now[np.arange(9)], index.embeddings)


def test_images_are_found_in_the_table_by_their_content(photos: Path, tmp_path: Path) -> None:
    def contents(images: list[Image.Image]) -> np.ndarray:
        return np.stack([np.frombuffer(bytes.fromhex(content_digest(one)), np.uint8) for one in images])

    images = [picture(n) for n in range(9)]
    with ImageIndex.build(images, tmp_path / "index", ENCODER, rule=OFF) as index:
        index.remove([id_of(images[2]), id_of(images[5])])
        asked = contents([images[8], images[2], picture(50), images[0]])
        assert index.frozen().places_of(asked).tolist() == [6, -1, -1, 0]
        index.compact()
        index.add([images[2]])
        assert index.frozen().places_of(asked).tolist() == [6, 7, -1, 0]
        assert index.frozen().places_of(asked[:0]).tolist() == []


def test_the_digest_follows_images_and_rule(photos: Path) -> None:
    with ImageIndex.build([photos], None, ENCODER) as index:
        seen = [index.digest]
        index.add([picture(40)])
        seen.append(index.digest)
        index.remove([id_of(picture(40))])
        seen.append(index.digest)
        frozen = index.frozen().digest
        index.set_rule(DedupConfig(cosine=0.77))
        seen.append(index.digest)
        assert frozen == seen[-2]
        assert index.frozen().digest == seen[-1]
        assert len(set(seen)) == 4
        assert index.digest == seen[-1]


def test_the_rule_is_calibrated_and_kept(photos: Path, tmp_path: Path) -> None:
    with ImageIndex.build([photos], tmp_path / "index", ENCODER) as index:
        calibrated = index.rule
        assert calibrated.cosine is not None
        assert 0.9 <= calibrated.cosine < 1
    with ImageIndex.open(tmp_path / "index", ENCODER) as index:
        assert index.rule == calibrated


def test_the_rule_waits_until_there_are_images_to_compare(tmp_path: Path) -> None:
    pictures = [picture(number) for number in range(20)]
    with ImageIndex.build(pictures, None, ENCODER) as index:
        expected = index.rule
    with ImageIndex.build(pictures[:1], tmp_path / "index", ENCODER) as index:
        assert index.rule == DedupConfig()
        index.add(pictures[1:])
        assert index.rule == expected
    with ImageIndex.open(tmp_path / "index", ENCODER) as index:
        assert index.rule == expected


@pytest.mark.parametrize("name", ["my-clips", "ViT-B/32", "siglip"])
def test_the_name_of_an_encoder_does_not_decide_what_is_a_copy(photos: Path, name: str) -> None:
    with (
        ImageIndex.build([photos], None, ENCODER) as known,
        ImageIndex.build([photos], None, ColourEncoder(name)) as one,
    ):
        assert one.rule == known.rule


@pytest.mark.parametrize("name", ["ViT-B/32", "openai/clip-vit-base-patch32", "own"])
@pytest.mark.parametrize("share", [0.02, 1.0])
def test_imported_copies_are_never_training_neighbors(tmp_path: Path, name: str, share: float) -> None:
    random, count = np.random.default_rng(0), 200
    rows = random.standard_normal((count, 64)).astype(np.float32)
    copied = int(share * count)
    np.save(tmp_path / "a.npy", np.concatenate([rows, rows[:copied] + 1e-2 * random.standard_normal((copied, 64))]))
    with ImageIndex.import_embeddings(tmp_path / "a.npy", tmp_path / "index", encoder_name=name) as index:
        assert index.rule == DedupConfig()
        table = self_neighbors(index.retriever.store, 5, index.rule)
        assert not (table[:copied] == np.arange(count, count + copied)[:, None]).any()


def test_a_sealed_index_takes_additions_in_memory_until_saved_elsewhere(photos: Path, tmp_path: Path) -> None:
    with ImageIndex.build([photos], tmp_path / "index", ENCODER) as index:
        index.save(tmp_path / "bundle", sealed=True)
    before = {path: path.read_bytes() for path in (tmp_path / "bundle").rglob("*") if path.is_file()}
    with ImageIndex.open(tmp_path / "bundle", ENCODER) as index:
        assert index.read_only
        index.add([picture(50)])
        assert index.search_image(picture(50), 1).ids == [[id_of(picture(50))]]
        assert index.preview(id_of(picture(50))) is not None
        index.check()
        index.save(tmp_path / "mine")
        with pytest.raises(UsageError, match=r"expected a new folder for the index, .*mine exists: choose another"):
            index.save(tmp_path / "mine")
    assert {path: path.read_bytes() for path in (tmp_path / "bundle").rglob("*") if path.is_file()} == before
    with ImageIndex.open(tmp_path / "mine", ENCODER) as index:
        assert not index.read_only
        assert len(index) == 12
        assert index.search_image(picture(50), 1).ids == [[id_of(picture(50))]]


def test_a_bundled_index_opens_by_its_name(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "BUNDLES", tmp_path)
    ImageIndex.build([photos], tmp_path / "toy" / "index", ENCODER).close()
    with ImageIndex.open("toy", ENCODER) as index:
        assert len(index) == 11
    with pytest.raises(
        StoreError, match=r"expected an image index in toys, found no store.sqlite: check the path or build one"
    ):
        ImageIndex.open("toys")


def test_an_index_is_not_made_under_a_name_that_is_no_text(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "i\udcff"
    message = r"expected a folder whose name is UTF-8 for the index, got .*\\udcff: choose another name"
    with pytest.raises(UsageError, match=message):
        ImageIndex.build([photos], folder, ENCODER)
    with ImageIndex.build([photos], None, ENCODER) as index, pytest.raises(UsageError, match=message):
        index.save(folder)
    np.save(tmp_path / "a.npy", np.eye(3, dtype=np.float32))
    with pytest.raises(UsageError, match=message):
        ImageIndex.import_embeddings(tmp_path / "a.npy", folder, encoder_name="toy")
    with pytest.raises(StoreError):
        ImageIndex.open(folder)


def test_an_interruption_keeps_what_was_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "ENCODE_IMAGES", 2)
    monkeypatch.setattr(ingest, "COMMIT_IMAGES", 4)

    def interrupt() -> Image.Image:
        raise KeyboardInterrupt

    sources = [SourceImage(f"{n}", f"{n}", lambda n=n: picture(n)) for n in range(7)]  # type: ignore[misc]
    with pytest.raises(KeyboardInterrupt):
        ImageIndex.build([*sources, SourceImage("late", "late", interrupt)], tmp_path / "index", ENCODER)
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == ["segments", "store.sqlite"]
    with ImageIndex.open(tmp_path / "index", ENCODER) as index:
        assert len(index) == 6  # the seventh was decoded, but not yet encoded
        index.check()
        assert index.add(sources).added == 1


@pytest.mark.parametrize("asked", [None, OFF])
def test_an_interrupted_build_gets_its_rule_when_it_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: DedupConfig | None
) -> None:
    monkeypatch.setattr(ingest, "COMMIT_IMAGES", 4)
    monkeypatch.setattr(embedding, "ENCODE_IMAGES", 4)
    images = [picture(number) for number in range(20)]
    broken = SourceImage("late", "late", lambda: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        ImageIndex.build([*images[:8], broken], tmp_path / "index", ENCODER, rule=asked)
    with ImageIndex.build(images, None, ENCODER, rule=asked) as index:
        expected = index.rule
    with ImageIndex.open(tmp_path / "index", ENCODER) as index:
        assert len(index) == 8
        assert index.add(images).added == 12
        assert index.rule == expected
        index.add([picture(number) for number in range(20, 40)])
    with ImageIndex.open(tmp_path / "index", ENCODER) as index:
        assert index.rule == expected


def test_a_full_disk_keeps_earlier_batches(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.replace, 0

    def full(*values: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*values)

    monkeypatch.setattr(embedding, "ENCODE_IMAGES", 2)
    monkeypatch.setattr(ingest, "COMMIT_IMAGES", 2)
    with ImageIndex.build([photos], tmp_path / "index", ENCODER) as index:
        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(KnnDiffusionError, match="the disk is full"):
            index.add([picture(n) for n in range(60, 70)])
        monkeypatch.setattr(os, "replace", real)
        assert len(index) == 15
        index.check()
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(KnnDiffusionError, match="could not be written"):
            index.save(tmp_path / "copy")
        assert not (tmp_path / "copy").exists()


def test_check_lists_everything_that_is_wrong(photos: Path, tmp_path: Path) -> None:
    cells = IndexConfig(exact_below=5, cells=2)
    with ImageIndex.build([photos], tmp_path / "index", ENCODER, settings=cells) as index:
        index.check()
    for path in (tmp_path / "index" / "segments").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    for path in (tmp_path / "index" / "cache").glob("*.faiss"):
        path.write_bytes(b"")
    with ImageIndex.open(tmp_path / "index", ENCODER) as index, pytest.raises(StoreError) as caught:
        index.check()
    text = str(caught.value)
    for part in (
        "embeddings.npy is damaged",
        "thumbnails.npy is damaged",
        "the search index in cache/ is damaged",
        "index is not sound",
    ):
        assert part in text
    assert "\n" not in text


def test_removing_is_all_or_nothing(photos: Path) -> None:
    with ImageIndex.build([photos], None, ENCODER) as index:
        red = index.search_text("red", 1).ids[0][0]
        with pytest.raises(UsageError, match=r"got 'x' \(1 of 2 unknown\)"):
            index.remove([red, "x"])
        index.remove([red])
        assert red not in index.search_text("red", 10).ids[0]
        with pytest.raises(UsageError, match="expected the id of an image"):
            index.source(red)


def test_searches_go_on_while_images_are_added(tmp_path: Path) -> None:
    wrong: list[str] = []
    done = threading.Event()
    with ImageIndex.build([picture(n) for n in range(8)], tmp_path / "index", ENCODER, rule=OFF) as index:
        query = ENCODER.encode_images([picture(3)])

        def work() -> None:
            while not done.is_set():
                found = index.search(query, 3)
                if found.ids[0][0] != id_of(picture(3)) or found.shortfall[0]:
                    wrong.append(str(found.ids))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in range(8, 14):
            index.add([picture(number)])
            index.remove([id_of(picture(number - 8))] if number - 8 != 3 else [])
        done.set()
        for thread in threads:
            thread.join()
    assert wrong == []


class Machine(RuleBasedStateMachine):
    """Whatever is done in whatever order, the index equals a dictionary searched by comparing everything."""

    root = Path()
    number = 0

    @initialize(cells=st.booleans())
    def begin(self, cells: bool) -> None:
        Machine.number += 1
        self.folder = self.root / str(Machine.number)
        self.settings = IndexConfig(exact_below=4, cells=2, image=Reach(probes=2, depth=30)) if cells else IndexConfig()
        self.index = ImageIndex.build([picture(0)], self.folder, ENCODER, rule=OFF, settings=self.settings)
        self.model = {id_of(picture(0)): picture(0)}

    @rule(seeds=st.lists(st.integers(0, 15), min_size=1, max_size=4))
    def add(self, seeds: list[int]) -> None:
        images = {id_of(picture(seed)): picture(seed) for seed in seeds}
        assert self.index.add([picture(seed) for seed in seeds]).added == len(images.keys() - self.model.keys())
        self.model |= images

    @precondition(lambda self: len(self.model) > 1)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        gone = data.draw(st.sampled_from(sorted(self.model)))
        self.index.remove([gone])
        del self.model[gone]

    @rule()
    def reopen(self) -> None:
        self.index.close()
        self.index = ImageIndex.open(self.folder, ENCODER, settings=self.settings)

    @rule()
    def move(self) -> None:
        self.index.save(self.folder.with_suffix(".new"))
        self.index.close()
        shutil.rmtree(self.folder)
        self.folder.with_suffix(".new").rename(self.folder)
        self.index = ImageIndex.open(self.folder, ENCODER, settings=self.settings)

    @rule(seed=st.integers(16, 40), k=st.integers(1, 6))
    def search(self, seed: int, k: int) -> None:
        k = min(k, len(self.model))
        query = ENCODER.encode_images([picture(seed)])
        vectors = {
            id_: ENCODER.encode_images([image])[0].astype(np.float16).astype(float) for id_, image in self.model.items()
        }
        scores = {id_: float(v @ query[0] / np.linalg.norm(v)) for id_, v in vectors.items()}
        found = self.index.search(query, k)
        np.testing.assert_allclose(found.scores[0], sorted(scores.values(), reverse=True)[:k], atol=1e-6)
        np.testing.assert_allclose([scores[id_] for id_ in found.ids[0]], found.scores[0], atol=1e-6)

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        if hasattr(self, "index"):
            assert set(self.index.ids) == self.model.keys()
            assert len(self.index) == len(self.model)

    def teardown(self) -> None:
        if hasattr(self, "index"):
            self.index.check()
            self.index.close()


def test_any_order_of_changes_keeps_the_index_right(tmp_path: Path) -> None:
    Machine.root = tmp_path
    machine = Machine.TestCase
    machine.settings = settings(
        max_examples=6, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    machine("runTest").runTest()


def test_ids_are_digests_of_size_and_pixels() -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    assert content_digest(image) == hashlib.sha256(b"2x1;" + bytes([1, 2, 3, 1, 2, 3])).hexdigest()
    assert content_digest(image) != content_digest(image.resize((1, 2)))


def test_digests_cover_alpha_only_where_there_is_any() -> None:
    drawn = picture(3)
    opaque = drawn.copy()
    opaque.putalpha(255)
    assert content_digest(opaque) == content_digest(drawn)
    halves = []
    for level, hidden in ((0, 0), (0, 90), (128, 0)):
        alpha = Image.new("L", drawn.size, 255)
        alpha.paste(level, (0, 0, 10, 20))
        half = drawn.copy()
        half.paste((hidden, 0, 0), (0, 0, 10, 20))
        half.putalpha(alpha)
        halves.append(half)
    plain, other_hidden_colour, other_alpha = (content_digest(half) for half in halves)
    assert plain == other_hidden_colour
    assert len({plain, other_alpha, content_digest(drawn), content_digest(halves[0].convert("RGB"))}) == 4
    assert content_digest(halves[2]) == hashlib.sha256(b"20x20 RGBA;" + halves[2].tobytes()).hexdigest()


def test_changes_to_an_overlay_leave_the_index_and_its_folder_alone(photos: Path, tmp_path: Path) -> None:
    with ImageIndex.build(photos, tmp_path / "index", ENCODER) as index:
        over = index.overlay()
        over.remove(over.ids[:1])
        assert (len(over), len(index)) == (len(index) - 1, len(index))
        with ImageIndex.open(tmp_path / "index", ENCODER) as again:
            assert again.ids == index.ids
    with pytest.raises(StoreError, match="this one is in memory: save it first"):
        ImageIndex.build(photos, None, ENCODER).overlay()


def test_images_are_decoded_while_others_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    together = threading.Barrier(3)

    def load(number: int) -> Image.Image:
        together.wait(30)  # breaks unless three are decoded at once
        return picture(number)

    found = [SourceImage(f"{n}.png", "", partial(load, n)) for n in range(9)]
    with ImageIndex.build(found, None, ENCODER, rule=OFF) as index:
        assert index.sources(index.ids) == [f"{n}.png" for n in range(9)]
