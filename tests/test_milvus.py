"""The distributed home: its conditions, what it keeps, how it fails, and how an index gets there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from milvus_server import ServerConnection

from knn_diffusion import ImageIndex
from knn_diffusion.errors import ConfigError, FingerprintError, MissingDependencyError, StoreError, UsageError
from knn_diffusion.retrieval.condition import rows_where
from knn_diffusion.retrieval.database import SCHEMA
from knn_diffusion.retrieval.dedup import OFF, DedupConfig
from knn_diffusion.retrieval.index import LocalRetriever
from knn_diffusion.retrieval.milvus import MilvusConfig, MilvusRetriever, collection_name, push
from knn_diffusion.retrieval.milvus.collection import building_parameters
from knn_diffusion.retrieval.milvus.condition import milvus_expression
from knn_diffusion.retrieval.plan import Reach
from knn_diffusion.retrieval.store import EncoderIdentity, Item, Store

DIM = 8
TOY = EncoderIdentity(name="toy", fingerprint="f" * 16, dim=DIM)
_numbers = count()


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    for module in ("pymilvus", "milvus_lite"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install knn-diffusion[milvus]")
    return str(tmp_path_factory.mktemp("milvus") / "images.db")


@pytest.fixture
def name() -> str:
    return f"images_{next(_numbers)}"


def vectors_of(number: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((number, DIM)).astype(np.float32)


def items_of(number: int, first: int = 0) -> list[Item]:
    contents = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(first, first + number)]
    return [Item(id=f"i{n}", source=f"{n}.png", content=one) for n, one in enumerate(contents, first)]


# Conditions

TEXTS = ("a", "A", "b", "é", "it's", 'say "x"', "50%", "line\nend", "")


def rows() -> list[tuple[str, str, str, float]]:
    return [(f"{n}{one}", one, two, float(n)) for n, (one, two) in enumerate((a, b) for a in TEXTS for b in TEXTS)]


def sql(value: object) -> str:
    return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else repr(value)


def leaf(draw: Callable[..., Any]) -> str:
    column = draw(st.sampled_from(("id", "source", "key", "added_at", "Source")))
    numbers = st.integers(-3, 90) | st.floats(-3, 90)
    values = numbers if column == "added_at" else st.sampled_from(TEXTS)
    kinds = ["compare", "in", "between"] + (["like"] if column != "added_at" else [])
    kind, negated = draw(st.sampled_from(kinds)), draw(st.sampled_from(("", "NOT ", "not ")))
    if kind == "compare":
        return f"{column} {draw(st.sampled_from(('=', '==', '!=', '<>', '<', '<=', '>', '>=')))} {sql(draw(values))}"
    if kind == "like":
        return f"{column} {negated}LIKE {sql(''.join(draw(st.lists(st.sampled_from(('%', '_', *TEXTS)), max_size=4))))}"
    if kind == "in":
        return f"{column} {negated}IN ({', '.join(sql(one) for one in draw(st.lists(values, min_size=1, max_size=3)))})"
    return f"{column} {negated}BETWEEN {sql(draw(values))} AND {sql(draw(values))}"


@st.composite
def conditions(draw: Callable[..., Any], depth: int = 2) -> str:
    if depth == 0 or draw(st.booleans()):
        return leaf(draw)
    left, right = draw(conditions(depth - 1)), draw(conditions(depth - 1))
    form = draw(st.sampled_from(("{} AND {}", "{} or {}", "NOT {} AND {}", "({}) AND NOT ({})", "not not {} OR({})")))
    return form.format(left, right)


@pytest.fixture(scope="module")
def both(uri: str) -> tuple[sqlite3.Connection, Any]:
    """The same rows in SQLite and in a collection."""
    database = sqlite3.connect(":memory:")
    database.executescript(SCHEMA)
    there = MilvusRetriever.create(uri, "conditions", TOY)
    contents = [hashlib.sha256(one[0].encode()).hexdigest() for one in rows()]
    for row, ((id_, source, key, added_at), content) in enumerate(zip(rows(), contents, strict=True)):
        values = (row, id_, source, key, bytes.fromhex(content), added_at)
        database.execute(
            "INSERT INTO items (row, id, source, key, content, added_at) VALUES (?, ?, ?, ?, ?, ?)", values
        )
    items = [Item(id=i, source=s, key=k, content=c) for (i, s, k, _), c in zip(rows(), contents, strict=True)]
    there.add(items, vectors_of(len(items)), added_at=np.array([one[3] for one in rows()]))
    return database, there


@settings(max_examples=60, deadline=None)
@given(condition=conditions())
@example(condition="source LIKE 'A%' AND NOT key LIKE '_'")
@example(condition="added_at IN (-0.0)")
def test_a_condition_keeps_the_images_that_sqlite_keeps(both: tuple[sqlite3.Connection, Any], condition: str) -> None:
    database, there = both
    expected = {rows()[row][0] for row in rows_where(database, condition)}
    found = there._query(milvus_expression(condition), ["id"])
    assert {row["id"] for row in found} == expected


@pytest.mark.parametrize(
    ("condition", "place"),
    [
        ("", "at its end"), ("id", "at its end"), ("id =", "at its end"), ("(id = 'a'", "at its end"),
        ("id = 5", "at '5'"), ("added_at = '5'", "at \"'5'\""), ("added_at > 1e999", "at '1e999'"),
        ('id = "a"', "at '\"a\"'"), ("colour = 'a'", "at \"colour"), ("id = 'a')", r"at '\)'"), ("id IN ()", r"at '\)'"),
        ("id IS NULL", "at 'IS NULL'"), ("lower(id) = 'a'", "at \"lower"), ("added_at + 1 > 2", r"at '\+ 1 > 2'"),
        ("id LIKE 'a' ESCAPE '!'", "at \"ESCAPE"), (r"id LIKE '\_'", "at \"'"), ("added_at LIKE '1%'", "at \"'1%'"),
        ("id GLOB 'a'", "at \"GLOB"), ("'a' = id", "at \"'a' = id"), ("id = 'a", "at \"'a"), ("id = '\0'", "at "),
        ("id = '\udcff'", "at "), ("(" * 40 + "id = 'a'" + ")" * 40, r"at .\(\("), ("id = 'a'; DELETE", "at '; DELETE'"),
    ],
)  # fmt: skip
def test_a_condition_beyond_the_grammar_is_refused_at_its_place(condition: str, place: str) -> None:
    text = rf"expected a condition of .* over id, source, key, added_at, such as .*not understood {place}.*: mend it"
    with pytest.raises(UsageError, match=text):
        milvus_expression(condition)


# What a collection keeps


def test_a_collection_knows_its_encoder_and_its_rule(uri: str, name: str) -> None:
    rule = DedupConfig(cosine=0.95, manhattan=None)
    MilvusRetriever.create(uri, name, TOY, rule=rule).add(items_of(3), vectors_of(3))
    with MilvusRetriever.open(uri, name, TOY) as opened:
        assert (opened.encoder, opened.rule, len(opened)) == (TOY, rule, 3)
        assert opened.sources(["i2", "i0"]) == ["2.png", "0.png"]
    other = EncoderIdentity(name="clip", fingerprint="e" * 16, dim=4)
    text = rf"collection {name} at .* built with toy \(8-d, f{{12}}\), the encoder is clip \(4-d, e{{12}}\): load that"
    with pytest.raises(FingerprintError, match=text):
        MilvusRetriever.open(uri, name, other)


def test_collections_that_are_not_there_or_not_ours_are_refused(uri: str, name: str) -> None:
    from pymilvus import MilvusClient

    with pytest.raises(
        StoreError, match=f"expected collection {name} at .*, there is none: check the name, or fill it"
    ):
        MilvusRetriever.open(uri, name)
    MilvusClient(uri).create_collection(name, dimension=DIM)
    with pytest.raises(
        StoreError, match="does not say which encoder made it: name a collection that knn-diffusion made"
    ):
        MilvusRetriever.open(uri, name)
    with pytest.raises(
        UsageError, match=f"expected a new collection, {name} exists at .*: choose another name or open"
    ):
        MilvusRetriever.create(uri, name, TOY)
    with pytest.raises(UsageError, match=r"expected a collection's name of letters.*got '1-a': choose another"):
        MilvusRetriever.open(uri, "1-a")


def test_ids_with_quotes_can_be_removed_and_excluded(uri: str, name: str) -> None:
    awkward = ["it's", 'say "x"', "back\\slash", "a'] or id != ['"]
    there = MilvusRetriever.create(uri, name, TOY, rule=OFF)
    items = [Item(id=id_, source="x", content=one.content) for id_, one in zip(awkward, items_of(4), strict=True)]
    there.add([*items, *items_of(2, 10)], vectors_of(6))
    for id_ in awkward:
        assert id_ not in there.search(vectors_of(1), len(there), [[id_]]).ids[0]
        there.remove([id_])
    assert sorted(there.search(vectors_of(1), 2).ids[0]) == ["i10", "i11"]
    assert len(there) == 2


def test_a_text_too_long_for_milvus_is_refused(uri: str, name: str) -> None:
    there = MilvusRetriever.create(uri, name, TOY)
    long = Item(id="a", source="é" * 2049, content="ab" * 32)
    with pytest.raises(UsageError, match="source of image 'a': expected at most 4096 bytes, got 4098: shorten it"):
        there.add([long], vectors_of(1))
    assert len(there) == 0


@pytest.mark.parametrize("index", ["IVF_FLAT", "IVF_SQ8", "HNSW"])
def test_an_approximate_index_still_gives_exactly_k(uri: str, name: str, index: Any) -> None:
    few = MilvusConfig(index=index, cells=16, image=Reach(probes=1, depth=1))
    there = MilvusRetriever.create(uri, name, TOY, settings=few, rule=OFF)
    vectors = vectors_of(300)
    there.add(items_of(300), vectors)
    assert (there._index.kind, there._index.cells) == (index, 16 if index != "HNSW" else 128)
    found = there.search(vectors_of(3, seed=1), 250, where="source LIKE '%.png'")
    assert found.shortfall.tolist() == [0, 0, 0]
    assert all(len(set(ids)) == 250 for ids in found.ids)
    short = there.search(vectors_of(1), 5, where="id IN ('i5', 'i6')")
    assert (sorted(short.ids[0][:2]), short.shortfall.tolist()) == (["i5", "i6"], [3])
    near = there.search(vectors[:20], 1)
    assert np.mean([ids == [f"i{n}"] for n, ids in enumerate(near.ids)]) > 0.9


# What a server is asked


def test_a_server_is_asked_for_float16_and_for_more_cells_for_texts(
    uri: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knn_diffusion.retrieval.milvus.retriever.Connection", ServerConnection)
    there = MilvusRetriever.create(uri, name, TOY)
    asked = there._connection
    assert isinstance(asked, ServerConnection)
    (built,) = asked.arguments("create_index")["index_params"]
    assert (built.index_type, built.get_index_configs()["metric_type"]) == ("IVF_SQ8", "COSINE")
    assert asked.arguments("create_collection")["consistency_level"] == "Strong"
    there.add(items_of(30), vectors_of(30))
    for modality, probes in (("image", 20), ("text", 128)):
        there.search(vectors_of(1), 3, modality=modality)
        assert asked.arguments("search")["search_params"]["params"] == {"nprobe": probes}
        assert asked.arguments("search")["consistency_level"] == "Strong"


def test_every_kind_of_index_has_its_parameters() -> None:
    assert building_parameters("FLAT", 64) == {}
    assert building_parameters("IVF_SQ8", 64) == {"nlist": 64}
    assert building_parameters("IVF_RABITQ", 64) == {"nlist": 64, "refine": True, "refine_type": "SQ8"}
    assert building_parameters("HNSW", 64) == {"M": 32, "efConstruction": 200}
    from knn_diffusion.retrieval.milvus.collection import VectorIndex

    reach = Reach(probes=20, depth=10)
    assert VectorIndex(kind="IVF_RABITQ", cells=8).search_parameters(reach, 5) == {"nprobe": 8, "refine_k": 10.0}
    assert VectorIndex(kind="HNSW", cells=1).search_parameters(reach, 5) == {"ef": 200}
    assert VectorIndex(kind="HNSW", cells=1).search_parameters(reach, 500) == {"ef": 500}
    assert VectorIndex(kind="FLAT", cells=1).search_parameters(reach, 5) == {}


@pytest.mark.parametrize("wrong", [{"cells": 0}, {"cells": 65_537}, {"timeout_seconds": 0.0}])
def test_an_impossible_setting_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be"):
        MilvusConfig(**wrong)


# Failing


@pytest.mark.parametrize(
    ("address", "error", "text"),
    [
        (
            "http://127.0.0.1:1",
            StoreError,
            r"no Milvus answers at http://127.0.0.1:1 \(.*\): check the address and the",
        ),
        ("http://me:secret@127.0.0.1:1", StoreError, "no Milvus answers at http://127.0.0.1:1 "),
        (
            "somewhere",
            UsageError,
            "expected http://host:port of a Milvus server or a file ending in .db, got 'somewhere'",
        ),
        ("nowhere/x.db", UsageError, "expected a file in an existing folder, got 'nowhere/x.db': create nowhere first"),
        (
            "notes.db",
            StoreError,
            r"notes.db cannot be opened by milvus-lite \(.*\): close the process that has it open",
        ),
    ],
)
def test_an_address_where_nothing_answers_fails_soon_in_one_line(
    uri: str, address: str, error: type[Exception], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.db").write_text("no database")
    started = time.monotonic()
    with pytest.raises(error, match=text) as raised:
        MilvusRetriever.open(address, "images", settings=MilvusConfig(timeout_seconds=2.0))
    assert time.monotonic() - started < 10
    assert "\n" not in str(raised.value)
    assert "secret" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


GONE = """
import sys
from milvus_lite.server_manager import server_manager_instance
from test_milvus import TOY, items_of, vectors_of
from knn_diffusion.errors import StoreError
from knn_diffusion.retrieval.milvus import MilvusConfig, MilvusRetriever

there = MilvusRetriever.create(sys.argv[1], "images", TOY, settings=MilvusConfig(timeout_seconds=2.0))
there.add(items_of(2), vectors_of(2))
server_manager_instance.release_server(sys.argv[1])
for call in (
    lambda: there.search(vectors_of(1), 1), lambda: there.add(items_of(1, 5), vectors_of(1)),
    lambda: there.remove(["i0"]), lambda: len(there),
):
    try:
        call()
    except StoreError as error:
        print(error)
"""


def test_a_server_that_goes_away_is_an_error_of_one_line_and_nothing_else_is_said(uri: str, tmp_path: Path) -> None:
    path = str(tmp_path / "short-lived.db")
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", GONE, path]
    ran = subprocess.run(command, env=os.environ | paths, capture_output=True, text=True, timeout=120, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    failed = (
        rf"Milvus at {path} failed to (search|query) \(.*\): check that the server runs and that the token may do this"
    )
    assert len(re.findall(f"^{failed}, then try again$", ran.stdout, re.MULTILINE)) == len(ran.stdout.splitlines()) == 4


def test_without_pymilvus_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(
        MissingDependencyError, match=r"expected pymilvus .* missing: pip install knn-diffusion\[milvus\]"
    ):
        MilvusRetriever.open(str(tmp_path / "x.db"), "images")


# Getting there


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store.create(tmp_path / "index", TOY)
    made.append(items_of(100), vectors_of(100))
    made.append(items_of(60, 100), vectors_of(60, 1), np.arange(60, dtype=np.uint8)[:, None].repeat(192, 1) * 4)
    made.append(items_of(1, 160), vectors_of(10)[9:])  # the same vector as i9
    made.remove(["i7", "i110"])
    return made


def test_a_pushed_index_answers_as_before(store: Store, uri: str, name: str) -> None:
    heard: list[tuple[str, int, int]] = []
    there = MilvusRetriever.create(uri, name, TOY)
    report = push(store, there, lambda *told: heard.append(told))
    assert (report.sent, report.already_present, report.in_store, report.in_collection) == (159, 0, 159, 159)
    assert heard[-1] == ("pushing images", 159, 159)
    here, queries = LocalRetriever(store), np.concatenate([vectors_of(10)[9:], vectors_of(5, 7)])
    for options in ({}, {"rule": OFF}, {"where": "source LIKE '1%' AND added_at > 1e9", "exclude_ids": [["i1"]] * 6}):
        before, after = here.search(queries, 12, **options), there.search(queries, 12, **options)
        assert after.ids == before.ids
        np.testing.assert_allclose(after.scores, before.scores, atol=1e-7)
        np.testing.assert_array_equal(after.embeddings, before.embeddings)
    middle = float(np.median([time for *_, time in store.facts(store.snapshot().live_rows)]))
    where = f"added_at <= {middle!r}"
    assert there.search(queries, 3, where=where).ids == here.search(queries, 3, where=where).ids


def test_a_push_goes_on_where_it_was_interrupted(
    store: Store, uri: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knn_diffusion.retrieval.milvus.transfer.BATCH_ROWS", 50)
    there = MilvusRetriever.create(uri, name, TOY)

    def interrupt(what: str, done: int, total: int) -> None:
        if done >= 99:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        push(store, there, interrupt)
    assert len(there) == 99
    report = push(store, there)
    assert (report.sent, report.already_present, report.in_collection) == (60, 99, 159)
    again = push(store, there)
    assert (again.sent, again.already_present, again.in_collection) == (0, 159, 159)
    store.append(items_of(1, 500), vectors_of(1, 9))
    assert push(store, there).sent == 1


def test_a_compaction_does_not_end_a_push(store: Store, uri: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knn_diffusion.retrieval.milvus.transfer.BATCH_ROWS", 50)
    there, compacted = MilvusRetriever.create(uri, name, TOY), list[int]()

    def compact(what: str, done: int, total: int) -> None:
        if done == 99 and not compacted:
            compacted.append(done)
            store.compact()

    report = push(store, there, compact)
    assert compacted
    assert (report.sent, report.already_present, report.in_collection) == (159, 0, 159)
    queries = np.concatenate([vectors_of(10)[9:], vectors_of(5, 7)])
    assert there.search(queries, 12).ids == LocalRetriever(store).search(queries, 12).ids


def test_a_push_that_lost_images_says_so(store: Store, uri: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    there = MilvusRetriever.create(uri, name, TOY)

    def lossy(*_: Any, **__: Any) -> np.ndarray:
        return np.ones(1, bool)

    monkeypatch.setattr(there, "add", lossy)
    with pytest.raises(
        StoreError, match=f"expected at least 159 images in collection {name} at .*, found 0: push again"
    ):
        push(store, there)


def test_any_folder_name_becomes_a_collection_name() -> None:
    assert [collection_name(one) for one in ("my-index", "2024", "", "é", "x" * 300)] == [
        "my_index", "_2024", "_", "_", "x" * 254,
    ]  # fmt: skip


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    from knn_diffusion.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(one) for one in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_command_pushes_and_tells(
    store: Store, uri: str, name: str, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = store.folder
    store.set_setting("dedup", '{"cosine": 0.98}')
    store.close()
    code, out, _ = run("index", "push", folder, uri, "--collection", name, "--json")
    assert code == 0
    assert json.loads(out) == {
        "sent": 159, "already_present": 0, "in_store": 159, "in_collection": 159,
        "uri": uri, "collection": name, "encoder": "toy", "dim": DIM,
    }  # fmt: skip
    monkeypatch.setenv("TOKEN", "root:Milvus")
    code, out, _ = run("index", "push", folder, uri, "--collection", name, "--token-env", "TOKEN")
    lines = f"sent 0, present before 159\n159 images in collection {name} at {uri}, 159 in {folder}\n"
    assert (code, out) == (0, lines)
    assert MilvusRetriever.open(uri, name).rule == DedupConfig(cosine=0.98)


def test_the_command_fails_in_one_line(store: Store, uri: str, name: str, run: Any, tmp_path: Path) -> None:
    folder = store.folder
    store.close()
    MilvusRetriever.create(uri, name, EncoderIdentity(name="clip", fingerprint="e" * 16, dim=DIM))
    for arguments, code, text in (
        ((folder, "http://127.0.0.1:1", "--timeout", 2), 1, "no Milvus answers at"),
        ((folder, uri, "--collection", name), 1, "built with clip"),
        ((folder, uri, "--token-env", "NOT_SET"), 2, "environment variable NOT_SET, it is not set: export it first"),
        ((folder, uri, "--collection", "a b"), 2, "expected a collection's name"),
        ((tmp_path / "nothing", uri), 1, "expected an image index in"),
    ):
        failed, out, err = run("index", "push", *arguments)
        assert (failed, out) == (code, "")
        assert re.fullmatch(r"error: [^\n]+\n", err)
        assert text in err


def test_the_guide_is_run_as_it_is_written(uri: str, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny_world import build_model, draw_pictures

    monkeypatch.chdir(tmp_path)
    pictures = draw_pictures(tmp_path / "pictures")
    ImageIndex.build(pictures, "my-index", build_model(tmp_path / "model", pictures) / "encoder").close()
    guide = (Path(__file__).parents[1] / "docs" / "milvus.md").read_text(encoding="utf-8")
    command = re.findall(r"^ {4}knn-diffusion (index push .*\.db)$", guide, re.MULTILINE)[0]
    assert run(*command.split())[:2] == (
        0,
        "sent 12, present before 0\n12 images in collection my_index at images.db, 12 in my-index\n",
    )
    (block,) = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, "docs/milvus.md", "exec"), names)
    assert names["best"]
