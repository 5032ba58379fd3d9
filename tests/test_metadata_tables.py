"""Metadata in tables: beside images, in imports and exports of embeddings, and for Milvus not at all."""

from __future__ import annotations

import csv
import io
import json
import math
import sqlite3
import tarfile
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embedding_files import DIM, MADE_BY, Encoder, imported, vectors, write_clip_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from knn_diffusion.errors import StoreError, UsageError
from knn_diffusion.image_index import ImageIndex
from knn_diffusion.image_index.metadata_table import match_tables
from knn_diffusion.images import find_images
from knn_diffusion.retrieval.interchange import Layout, export_vectors
from knn_diffusion.retrieval.metadata import metadata_kinds
from knn_diffusion.retrieval.milvus.condition import milvus_expression
from knn_diffusion.retrieval.store import Item, Store

FACTS: list[dict[str, Any]] = [
    {"width": 640, "punsafe": 0.25, "licence": "CC0", "animated": True, "url": "http://a/0"},
    {"width": 512, "punsafe": 1, "animated": False},
    {},
    {"width": 8, "licence": 'Ä, "b"\n', "mixed": 5},
    {"mixed": "five"},
]


def told(store: Store) -> list[dict[str, Any]]:
    return store.metadata(store.snapshot().live_rows)


def stored(metadata: Sequence[Mapping[str, Any]]) -> Store:
    store = Store.create(None, MADE_BY)
    items = [Item(source=f"{n}.png", content=f"{n:064x}", metadata=one) for n, one in enumerate(metadata)]
    store.append(items, vectors(len(items)))
    return store


# Embeddings of others, and for them


def test_further_columns_of_a_clip_retrieval_folder_are_metadata(tmp_path: Path) -> None:
    from pyarrow import parquet, table

    folder = write_clip_folder(tmp_path / "clip")
    for path, count in (
        (folder / "metadata" / "metadata_0.parquet", 10),
        (folder / "metadata" / "metadata_1.parquet", 20),
    ):
        columns = {
            "url": [f"http://{n}" for n in range(count)],
            "WIDTH": list(range(count)),
            "similarity": [0.5, None, float("nan"), float("inf"), *[0.25] * (count - 4)],
            "NSFW": ["UNLIKELY"] * count,
            "image size": [3] * count,
            "exif": [[1, 2]] * count,
            "thumb": [b"x"] * count,
            "crc32": [n % 2 == 0 for n in range(count)],
        }
        parquet.write_table(table(columns), path)
    store, report = imported(folder)
    assert report.added == 30
    first = {"WIDTH": 0, "similarity": 0.5, "NSFW": "UNLIKELY", "image_size": 3, "crc32_": True}
    assert told(store)[0] == told(store)[10] == first
    assert [one.get("similarity") for one in told(store)[1:4]] == [None] * 3
    assert np.flatnonzero(store.matching("width >= 15 AND nsfw = 'UNLIKELY'")).tolist() == [25, 26, 27, 28, 29]
    assert store.problems() == []


def test_further_fields_of_json_lines_are_metadata(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", vectors(3))
    lines = [{"source": "a", "id": "x", "width": 5, "tags": ["a"]}, {"source": "b", "width": None, "hash": 2**70}, {}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    store, _ = imported(tmp_path / "rows.npy", provenance=tmp_path / "rows.jsonl")
    assert told(store) == [{"width": 5}, {"hash": str(2**70)}, {}]


@pytest.mark.parametrize("layout", ["clip-retrieval", "npy"])
def test_an_export_and_its_import_keep_the_metadata(layout: Layout, tmp_path: Path) -> None:
    export_vectors(stored(FACTS), tmp_path / "out", layout=layout)
    back, _ = imported(tmp_path / "out")
    url, mixed = {**FACTS[0], "url_": "http://a/0"}, {"npy": 5, "clip-retrieval": "5"}[layout]
    del url["url"]
    assert told(back) == [url, FACTS[1], {}, {**FACTS[3], "mixed": mixed}, FACTS[4]]
    assert [item.source for item in back.items(np.arange(5))] == [f"{n}.png" for n in range(5)]


def test_an_export_has_no_columns_of_names_that_no_image_has_any_more() -> None:
    with stored([{"gone": 1}, {"width": 2}, {"width": 0.5}]) as store:
        store.remove([store.items(np.arange(1))[0].id])
        store.compact()
        assert store.live.metadata_names == ("gone", "width")
        assert metadata_kinds(store.live) == {"width": float}


@pytest.mark.parametrize("damage", ["'width', 'wodth'", "'}', ''"])
def test_damaged_metadata_is_not_exported(damage: str, tmp_path: Path) -> None:
    with Store.create(tmp_path / "index", MADE_BY) as store:
        store.append([Item(source="a", content=f"{1:064x}", metadata={"width": 5})], vectors(1))
    raw = sqlite3.connect(tmp_path / "index" / "store.sqlite")
    raw.execute(f"UPDATE metadata SET facts = replace(facts, {damage})")
    raw.commit()
    raw.close()
    with Store.open(tmp_path / "index") as store, pytest.raises(StoreError, match="damaged"):
        export_vectors(store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_without_metadata_has_the_columns_it_had(tmp_path: Path) -> None:
    from pyarrow import parquet

    export_vectors(stored([{}, {}]), tmp_path / "out")
    names = parquet.read_schema(tmp_path / "out" / "metadata" / "metadata_0.parquet").names
    assert names == ["id", "image_path", "key", "content_sha256"]


# Beside images


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png", "more/c.png", "more/a.png")):
        Image.new("RGB", (8, 8), (60 * number, 9, 9)).save(folder / name)
    return folder


def shard(photos: Path) -> Path:
    path = photos.parent / "shard.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(photos / "a.png", "000.png")
        archive.add(photos / "b.png", "001.png")
    return path


def write(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def matched(tables: Any, *images: Path) -> tuple[dict[str, Any], int]:
    """Metadata by the image's path below the folder of the test."""
    found = match_tables(tables, find_images(images))
    root = str(images[0].parent) + "/"
    return {source.removeprefix(root): dict(one) for source, one in found.metadata.items()}, found.unmatched


def test_a_row_names_its_image_by_path_or_by_a_name_that_one_image_has(photos: Path) -> None:
    table = write(
        photos / "facts.csv",
        "source,width",
        f"{photos / 'a.png'},1",  # absolute
        "more/a.png,2",  # relative to the table
        "c.png,3",  # a name
        "nothing.png,4",
    )
    assert matched(table, photos) == ({"photos/a.png": {"width": 1}, "photos/more/a.png": {"width": 2},
                                       "photos/more/c.png": {"width": 3}}, 1)  # fmt: skip
    elsewhere = write(photos.parent / "facts.jsonl", '{"file_name": "a.png", "width": 5}', '{"file_name": "b.png"}')
    assert matched(elsewhere, photos) == ({"photos/b.png": {}}, 1), "two images are called a.png"


def test_a_key_names_a_member_of_a_shard(photos: Path) -> None:
    table = write(
        photos / "facts.jsonl", '{"key": "000", "url": "http://a"}', '{"key": "001.png", "ok": true}', '{"key": "2"}'
    )
    expected = {"shard.tar::000.png": {"url": "http://a"}, "shard.tar::001.png": {"ok": True}}
    assert matched(table, shard(photos)) == (expected, 1)


def test_several_tables_may_tell_of_images_but_each_image_once(photos: Path) -> None:
    for name in ("a", "b"):
        write(photos / f"{name}.csv", "source,width", f"{name}.png,7")
    assert matched(str(photos / "*.csv"), photos)[0].keys() == {"photos/a.png", "photos/b.png"}
    with pytest.raises(
        UsageError, match=r"expected one row for each image, .*a.csv has another for .*a.png: take one away"
    ):
        matched([photos / "a.csv", photos / "a.csv"], photos)


def test_numbers_of_a_csv_are_numbers_where_the_whole_column_is(photos: Path) -> None:
    table = write(
        photos / "facts.csv",
        "source,whole,float,empty,code,word,text,huge",
        'a.png,5,0.5,,007,5,"x, ""y""",1e999',
        "b.png,-12,3,,8,five,,1",
    )
    found = matched(table, photos / "a.png", photos / "b.png")[0]
    assert found == {
        "a.png": {"whole": 5, "float": 0.5, "code": "007", "word": "5", "text": 'x, "y"'},
        "b.png": {"whole": -12, "float": 3.0, "code": "8", "word": "five", "huge": 1.0},
    }
    assert isinstance(found["a.png"]["whole"], int)


GAPS = ["nan", "NaN", "n/a", "N/A", "null", "NULL", "<NA>", "#N/A", "", " nan"]


@pytest.mark.parametrize("gap", [*GAPS, "NA", "None", "-", "?"])
@pytest.mark.parametrize("other", ["640", "0.5"])
def test_what_is_not_known_leaves_a_column_of_a_csv_numbers(photos: Path, gap: str, other: str) -> None:
    table = write(photos / "facts.csv", "source,x", f"a.png,{other}", f"b.png,{gap}")
    found = matched(table, photos / "a.png", photos / "b.png")[0]
    assert found == {"a.png": {"x": float(other)}, "b.png": {}}


@pytest.mark.parametrize("gap", GAPS)
def test_what_is_not_known_is_left_out_of_texts_and_of_other_tables(photos: Path, gap: str) -> None:
    lines = [{"file_name": "a.png", "x": gap, "y": None}, {"file_name": "b.png", "x": "a word", "y": math.nan}]
    for table in (
        write(photos / "facts.csv", "source,x", f"a.png,{gap}", "b.png,a word"),
        write(photos / "facts.jsonl", *map(json.dumps, lines)),
    ):
        assert matched(table, photos / "a.png", photos / "b.png")[0] == {"a.png": {}, "b.png": {"x": "a word"}}


def test_a_number_that_no_64_bits_hold_makes_its_column_texts(photos: Path) -> None:
    table = write(
        photos / "facts.csv", "source,phash,low", "a.png,18446744073709551615,-9223372036854775808", "b.png,7,7"
    )
    found = matched(table, photos / "a.png", photos / "b.png")[0]
    assert found["a.png"] == {"phash": "18446744073709551615", "low": -(2**63)}
    assert found["b.png"] == {"phash": "7", "low": 7}


def test_spaces_after_commas_belong_to_no_field(photos: Path) -> None:
    table = write(photos / "facts.csv", "source, width, word", 'a.png, 640, "x, y"')
    assert matched(table, photos / "a.png")[0] == {"a.png": {"width": 640, "word": "x, y"}}


def members(path: Path, *names: str) -> Path:
    with tarfile.open(path, "w") as archive:
        for number, name in enumerate(names):
            content = io.BytesIO()
            Image.new("RGB", (8, 8), (60 * number, len(path.name), 9)).save(content, "PNG")
            info = tarfile.TarInfo(name)
            info.size = content.tell()
            content.seek(0)
            archive.addfile(info, content)
    return path


@pytest.mark.parametrize(
    ("member", "called"),
    [
        ("./0001.png", "key,w 0001,5"),
        ("./0001.png", "key,w ./0001.png,5"),
        ("././a/0001.png", "key,w a/0001,5"),
        ("0001.input.png", "key,w 0001,5"),
        ("0001.input.png", "key,w 0001.input,5"),
        ("v1.0/0001.jpg.png", "key,w v1.0/0001,5"),
        (unicodedata.normalize("NFD", "café.png"), "key,w " + unicodedata.normalize("NFC", "café,5")),
        (unicodedata.normalize("NFC", "café.png"), "source,w " + unicodedata.normalize("NFD", "café.png,5")),
        ("./0001.png", "source,w 0001.png,5"),
        ("./0001.png", "source,w shard.tar::0001.png,5"),
        ("a/0001.png", "source,w shard.tar::a\\0001.png,5"),
    ],
)
def test_a_name_finds_its_image_as_other_programs_write_it(tmp_path: Path, member: str, called: str) -> None:
    archive = members(tmp_path / "shard.tar", member)
    found, unmatched = matched(write(tmp_path / "facts.csv", *called.split(" ")), archive)
    assert (list(found.values()), unmatched) == ([{"w": 5}], 0)


def test_names_that_differ_in_their_unicode_form_only_stay_two(tmp_path: Path) -> None:
    forms = [unicodedata.normalize(form, "café.png") for form in ("NFC", "NFD")]
    archive = members(tmp_path / "shard.tar", *forms)
    found = matched(write(tmp_path / "facts.csv", "source,w", f"{forms[0]},1", f"{forms[1]},2"), archive)[0]
    assert found == {f"shard.tar::{forms[0]}": {"w": 1}, f"shard.tar::{forms[1]}": {"w": 2}}


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_table_called_like_a_shard_tells_of_that_shard_alone(tmp_path: Path, ending: str) -> None:
    shards = [members(tmp_path / f"s{n}.tar", "0001.png", *(["0002.png"] if n else [])) for n in range(2)]
    rows = (
        ("key,w", "0001,{n}", "0002,{n}")
        if ending == "csv"
        else ('{{"key": "0001", "w": {n}}}', '{{"key": "0002", "w": {n}}}')
    )
    tables = [write(tmp_path / f"s{n}.{ending}", *(row.format(n=n) for row in rows)) for n in range(2)]
    expected = {"s0.tar::0001.png": {"w": 0}, "s1.tar::0001.png": {"w": 1}, "s1.tar::0002.png": {"w": 1}}
    assert matched(tables, *shards) == (expected, 1)


def test_rows_without_an_image_are_explained(tmp_path: Path) -> None:
    shards = [members(tmp_path / f"s{n}.tar", "0001.png") for n in range(2)]
    table = write(tmp_path / "facts.csv", "key,w", "0001,5", "0007,5", *(f"{n},5" for n in range(9)))
    found = match_tables(table, find_images(shards))
    assert found.unmatched == 11
    assert [one.partition(": ")[2] for one in found.reasons] == [
        f"'0001' could be 2 images, such as {tmp_path}/s0.tar::0001.png and {tmp_path}/s1.tar::0001.png",
        "no image is called '0007'",
        "no image is called '0'",
    ]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.one_of(st.integers(-99, 99), st.floats(-9, 9, width=16), st.sampled_from(["a", "1 ", ""])), min_size=1)
)
def test_a_column_of_a_csv_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, column: list[Any]
) -> None:
    folder = tmp_path_factory.mktemp("csv")
    images = [folder / f"{n}.png" for n in range(len(column))]
    with (folder / "facts.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [("source", "x"), *((path.name, value) for path, value in zip(images, column, strict=True))]
        )
    for path in images:
        path.touch()
    found = match_tables(folder / "facts.csv", find_images([folder])).metadata
    texts = any(isinstance(one, str) and one for one in column)
    expected = [str(one) if texts else one for one in column]
    assert [found[str(path)].get("x", "") for path in images] == expected


def test_the_other_columns_of_an_image_table_can_be_metadata(photos: Path) -> None:
    from pyarrow import parquet, table

    pictures = [(photos / name).read_bytes() for name in ("a.png", "b.png")]
    parquet.write_table(
        table({"image": pictures, "label": ["x", "y"], "key": ["k", "l"]}), photos.parent / "images.parquet"
    )
    images = photos.parent / "images.parquet"
    assert matched(images, images) == ({"images.parquet::0": {"label": "x"}, "images.parquet::1": {"label": "y"}}, 0)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("facts.csv", ["name,width", "a.png,5"], "expected a column source or key that names the image, .* has name, width: "),
        ("facts.csv", ["source,width", "a.png"], r"facts.csv, line 2: expected 2 fields, got 1: mend the line"),
        ("facts.csv", ["source,x,x", "a.png,1,2"], "expected columns of different names, got source, x, x in .*: rename one"),
        ("facts.csv", [], "expected a line that names the columns of .*facts.csv, it is empty: write one"),
        ("facts.csv", ["source", '"a'], r"expected a CSV table in UTF-8, .* is none \(unexpected end of data\): save it so"),
        ("facts.txt", ["source"], "expected a .csv, .jsonl or .parquet table of metadata, got .*facts.txt: convert it"),
        ("facts.jsonl", ["[]"], "expected a JSON object, got list: mend the line"),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_used_is_refused(photos: Path, name: str, rows: list[str], message: str) -> None:
    with pytest.raises(Exception, match=message) as raised:
        matched(write(photos.parent / name, *rows), photos)
    assert raised.type.__name__ in ("UsageError", "StoreError")
    with pytest.raises(UsageError, match="expected a table of metadata, nowhere.csv does not exist: check the path"):
        matched("nowhere.csv", photos)


def test_an_index_is_built_and_searched_with_metadata(photos: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "facts.csv", "source,width", "photos/b.png,640", "c.png,100", "gone.png,5")
    with ImageIndex.build([photos], tmp_path / "index", Encoder(), metadata=table) as index:
        assert index.report is not None
        assert (index.report.added, index.report.unmatched_rows) == (4, 1)
        found = index.search(np.ones((1, DIM), np.float32), 1, where="width >= 512 AND source LIKE '%.png'")
        assert index.sources(found.ids[0]) == [str(photos / "b.png")]
        assert index.metadata(found.ids[0]) == [{"width": 640}]
        assert index.metadata(index.ids) == [{}, {"width": 640}, {}, {"width": 100}]
        with pytest.raises(UsageError, match="expected the id of an image"):
            index.metadata(["unknown"])
        Image.new("RGB", (8, 8), "white").save(photos / "new.png")
        write(tmp_path / "facts.csv", "source,width,licence", "photos/new.png,7,CC0", "photos/a.png,5,CC0")
        assert index.add(photos, metadata=[tmp_path / "facts.csv"]).added == 1
        assert index.metadata(index.ids) == [{}, {"width": 640}, {}, {"width": 100}, {"width": 7, "licence": "CC0"}]
        index.check()


# Milvus


@pytest.mark.parametrize("condition", ["width >= 512", "source = 'a' AND Licence = 'CC0'", "NOT (animated = 1)"])
def test_a_condition_over_metadata_is_refused_in_milvus_and_says_why(condition: str) -> None:
    with pytest.raises(UsageError, match="not sent to Milvus, filter by it in the index on this machine") as raised:
        milvus_expression(condition)
    assert "\n" not in str(raised.value)
