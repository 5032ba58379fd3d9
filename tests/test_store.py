"""The store keeps what it acknowledged, as a whole or not at all, and notices damage."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from store_world import DIM, TOY, batch, content, everything, filled, id_of

from knn_diffusion.errors import FingerprintError, KnnDiffusionError, StoreError, UsageError
from knn_diffusion.retrieval import database, manifest
from knn_diffusion.retrieval import store as module
from knn_diffusion.retrieval.segments import CompactedError
from knn_diffusion.retrieval.store import Item, Store


def test_what_was_added_is_there_after_reopening(tmp_path: Path) -> None:
    with filled(tmp_path / "index", range(5), range(5, 8)) as store:
        before = everything(store)
    with Store.open(tmp_path / "index") as store:
        assert store.encoder == TOY
        assert everything(store) == before
        assert list(before) == [content(n)[:16] for n in range(8)]
        assert before[content(6)[:16]][3] == b"picture 6"
        assert store.problems() == []


def test_stored_vectors_are_the_directions_in_half_precision() -> None:
    items, vectors, _, _ = batch(range(4))
    with Store.create(None, TOY) as store:
        store.append(items, 7 * vectors)
        expected = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
        np.testing.assert_allclose(store.embeddings(np.arange(4)).astype(float), expected.astype(float), atol=1e-3)
        assert not store.thumbnails(np.arange(4))[1].any()


def test_other_tools_can_read_the_segments(tmp_path: Path) -> None:
    with filled(tmp_path / "index", range(3)) as store:
        vectors = np.load(tmp_path / "index" / "segments" / "00000001.embeddings.npy", allow_pickle=False)
        np.testing.assert_array_equal(vectors, store.embeddings(np.arange(3)))


def test_the_same_content_is_not_added_twice() -> None:
    items, vectors, thumbnails, _ = batch(range(4))
    with Store.create(None, TOY) as store:
        assert store.append(items[:3] + items[:1], vectors[[0, 1, 2, 0]]).tolist() == [True, True, True, False]
        assert store.append(items, vectors, thumbnails).tolist() == [False, False, False, True]
        assert len(store) == 4


def test_a_removed_image_can_come_back_as_a_new_row() -> None:
    with filled(None, range(3)) as store:
        store.remove([content(1)[:16]])
        assert store.id_of_content(content(1)) is None
        store.append(*batch(range(1, 2)))
        assert store.rows_of([content(n)[:16] for n in range(3)]).tolist() == [0, 3, 2]


def test_a_given_id_is_kept_and_cannot_be_taken_twice() -> None:
    vectors = batch(range(2))[1]
    with Store.create(None, TOY) as store:
        store.append([Item(source="a", content=content(0), id="heart")], vectors[:1])
        assert store.rows_of(["heart", "other"]).tolist() == [0, -1]
        with pytest.raises(UsageError, match="id 'heart' is taken by other content: choose another id or remove"):
            store.append([Item(source="b", content=content(1), id="heart")], vectors[1:])
        assert len(store) == 1


def test_contents_that_agree_in_their_first_digits_get_different_ids() -> None:
    twins = ["ab" * 8 + "00" * 24, "ab" * 8 + "11" * 24]
    with Store.create(None, TOY) as store:
        store.append([Item(source="", content=one) for one in twins], batch(range(2))[1])
        assert [item.id for item in store.items(np.arange(2))] == [twins[0][:16], twins[1]]


def test_removing_an_unknown_id_removes_nothing() -> None:
    with filled(None, range(3)) as store:
        with pytest.raises(UsageError, match=r"got 'nobody' \(1 of 2 unknown\): search the index.*nothing was removed"):
            store.remove([content(0)[:16], "nobody"])
        assert len(store) == 3


@pytest.mark.parametrize(
    ("vectors", "error", "text"),
    [
        (np.ones((1, DIM + 1)), FingerprintError, "expected vectors of 6 numbers, got 7: use the index's encoder"),
        (
            np.zeros((1, DIM)),
            UsageError,
            "expected finite vectors other than zero, row 0 is zero: encode that input again",
        ),
        (np.full((1, DIM), np.nan), UsageError, "row 0 is not finite"),
        (np.full((1, DIM), np.inf), UsageError, "row 0 is not finite"),
    ],
)
def test_bad_vectors_are_refused_and_the_store_stays(vectors: np.ndarray, error: type[Exception], text: str) -> None:
    with filled(None, range(2)) as store:
        before = everything(store)
        with pytest.raises(error, match=text):
            store.append([Item(source="x", content=content(9))], vectors)
        assert everything(store) == before


def test_file_names_that_are_no_text_are_kept_readable() -> None:
    with Store.create(None, TOY) as store:
        store.append([Item(source="caf\udce9\n😀.png", content=content(0))], batch(range(1))[1])
        assert store.items(np.arange(1))[0].source == "caf\\udce9\n😀.png"


def test_closing_leaves_no_journal(tmp_path: Path) -> None:
    with filled(tmp_path / "index", range(3)) as store:
        store.remove([content(0)[:16]])
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == ["segments", "store.sqlite"]
    rollback_journal = b"\1\1"  # of SQLite's file format: such a file opens where nothing can be written
    assert (tmp_path / "index" / "store.sqlite").read_bytes()[18:20] == rollback_journal


def test_a_sealed_copy_is_read_only_and_gets_no_files_beside_it(tmp_path: Path) -> None:
    with filled(tmp_path / "index", range(3), range(3, 6)) as store:
        store.set_setting("note", "kept")
        store.remove([content(2)[:16]])
        expected = everything(store)
        (tmp_path / "bundle").mkdir()
        store.copy_to(tmp_path / "bundle", sealed=True)
    files = sorted(tmp_path.glob("bundle/**/*"))
    contents = [path.read_bytes() for path in files if path.is_file()]
    with Store.open(tmp_path / "bundle") as store:
        assert store.read_only
        assert everything(store) == expected
        assert store.setting("note") == "kept"
        store.append(*batch(range(10, 12)))
        store.remove([content(0)[:16]])
        assert set(everything(store)) == {content(n)[:16] for n in (1, 3, 4, 5, 10, 11)}
        assert store.problems() == []
        (tmp_path / "copy").mkdir()
        store.copy_to(tmp_path / "copy")
        overlaid = everything(store)
    assert sorted(tmp_path.glob("bundle/**/*")) == files
    assert [path.read_bytes() for path in files if path.is_file()] == contents
    with Store.open(tmp_path / "copy") as store:
        assert not store.read_only
        assert everything(store) == overlaid


def test_a_sealed_store_opens_where_nothing_may_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with filled(tmp_path / "index", range(3)) as store:
        expected = everything(store)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with Store.open(tmp_path / "index") as store:
        assert store.read_only
        assert everything(store) == expected


def test_one_process_sees_what_another_commits(tmp_path: Path) -> None:
    with filled(tmp_path / "index", range(2)) as writer, Store.open(tmp_path / "index") as reader:
        assert len(reader) == 2
        writer.append(*batch(range(2, 5)))
        assert len(reader) == 5
        snapshot = reader.snapshot()
        writer.remove([content(0)[:16]])
        assert len(reader) == 4
        assert snapshot.alive.all()


def test_a_second_writer_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "LOCK_SECONDS", 0.05)
    with filled(tmp_path / "index", range(2)) as store:
        other = sqlite3.connect(tmp_path / "index" / "store.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with (
            Store.open(tmp_path / "index") as second,
            pytest.raises(StoreError, match="is in use by another writer: wait"),
        ):
            second.remove([content(0)[:16]])
        other.execute("ROLLBACK")
        other.close()
        store.remove([content(0)[:16]])
        assert len(store) == 1


FAILING: list[tuple[str, Callable[..., Any]]] = [("replace", os.replace), ("fsync", os.fsync)]


@pytest.mark.parametrize(("name", "real"), FAILING, ids=["replace", "fsync"])
@pytest.mark.parametrize("call", range(4))
def test_a_failing_disk_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, real: Callable[..., Any], call: int
) -> None:
    store = filled(tmp_path / "index", range(3))
    before, calls = everything(store), 0

    def failing(*values: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*values)

    monkeypatch.setattr(os, name, failing)
    reached = name == "fsync" or call < 2  # two files: two renames, and a sync of each file and its folder
    if reached:
        with pytest.raises(
            KnnDiffusionError, match=r"could not be written \(the disk is full\): free space .* nothing was ch"
        ):
            store.append(*batch(range(3, 6)))
    monkeypatch.setattr(os, name, real)
    assert everything(store) == before
    store.append(*batch(range(3, 6)))
    assert len(store) == 6
    store.close()
    assert len(list((tmp_path / "index" / "segments").iterdir())) == 4
    with Store.open(tmp_path / "index") as store:
        assert len(store) == 6
        assert store.problems() == []


def test_a_full_database_leaves_the_old_state(tmp_path: Path) -> None:
    with filled(tmp_path / "index", range(3)) as store:
        before = everything(store)
        writer = store.live.open_writer()
        pages = writer.execute("PRAGMA page_count").fetchone()[0]
        writer.execute(f"PRAGMA max_page_count={pages}")
        items, vectors, thumbnails, _ = batch(range(3, 60))
        with pytest.raises(
            StoreError, match=r"could not be read or written \(.*full\): free space or change permissions"
        ):
            store.append(items, vectors, thumbnails, [b"x" * 3000] * 57)
        assert everything(store) == before
        writer.execute(f"PRAGMA max_page_count={pages + 1000}")
        store.append(items, vectors, thumbnails)
        assert len(store) == 60
        assert store.problems() == []


def test_a_failed_addition_in_memory_leaves_nothing() -> None:
    with filled(None, range(3)) as store:
        with pytest.raises(TypeError):
            store.append(*batch(range(3, 5))[:3], [b"fine", 5])  # type: ignore[list-item]
        store.append(*batch(range(5, 9)))
        assert set(everything(store)) == {content(n)[:16] for n in (0, 1, 2, 5, 6, 7, 8)}


def test_files_that_no_commit_names_are_swept(tmp_path: Path) -> None:
    with filled(tmp_path / "index", range(3)) as store:
        (tmp_path / "index" / "segments" / ".writing-left").write_bytes(b"torn")
        (tmp_path / "index" / "segments" / "00000002.embeddings.npy").write_bytes(b"torn")
        store.append(*batch(range(3, 5)))
        assert store.problems() == []
        assert len(list((tmp_path / "index" / "segments").iterdir())) == 4


@pytest.mark.parametrize("name", ["00000001.embeddings.npy", "00000002.thumbnails.npy"])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_damaged_segment_is_noticed_when_it_is_read(tmp_path: Path, name: str, damage: str) -> None:
    filled(tmp_path / "index", range(3), range(3, 6)).close()
    path = tmp_path / "index" / "segments" / name
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(whole if damage == "flip" else whole[:-9])
    with Store.open(tmp_path / "index") as store:
        with pytest.raises(
            StoreError, match=f"{name} (is damaged|cannot be read).*: restore a copy or build the index again"
        ):
            everything(store)
        assert len(store.problems()) == 1
        assert store.problems()[0].startswith(name)


def test_a_changed_item_or_preview_is_noticed_by_the_check(tmp_path: Path) -> None:
    filled(tmp_path / "index", range(3)).close()
    raw = sqlite3.connect(tmp_path / "index" / "store.sqlite")
    raw.execute("UPDATE items SET source = 'elsewhere' WHERE row = 1")
    raw.execute("UPDATE previews SET picture = x'00' WHERE row = 2")
    raw.commit()
    raw.close()
    with Store.open(tmp_path / "index") as store:
        assert store.problems() == [
            "store.sqlite: the items of segment 1 are not those that were added", "the preview of row 2 is damaged",
        ]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE settings SET value = replace(value, 'toy', 'tox') WHERE name = 'encoder'",
        "UPDATE settings SET value = 'changed' WHERE name = 'note'",
        "UPDATE settings SET value = '2' WHERE name = 'generation'",
        "UPDATE segments SET embeddings_sha256 = replace(embeddings_sha256, 'a', 'b')",
        "UPDATE segments SET num_rows = num_rows - 1",
        "DELETE FROM segments",
        "UPDATE items SET deleted_at = NULL WHERE deleted_at IS NOT NULL",
        "UPDATE items SET deleted_at = 1 WHERE deleted_at IS NULL AND row % 3 = 0",
        "UPDATE purged SET count = count + 1",
        "DELETE FROM purged",
    ],
)
def test_a_change_of_the_small_tables_is_refused_at_once(tmp_path: Path, change: str) -> None:
    with filled(tmp_path / "index", range(6)) as store:
        store.set_setting("note", "kept")
        store.remove([content(2)[:16]])
        store.compact()
        store.append(*batch(range(6, 9)))
        store.remove([content(7)[:16]])
    raw = sqlite3.connect(tmp_path / "index" / "store.sqlite")
    assert raw.execute(change).rowcount
    raw.commit()
    raw.close()
    with pytest.raises(
        StoreError, match=r"damaged store.sqlite \(its .* not the signed ones?\): restore a copy or build"
    ):
        Store.open(tmp_path / "index")


def test_a_changed_item_or_preview_is_refused_when_it_is_read(tmp_path: Path) -> None:
    filled(tmp_path / "index", range(5)).close()
    raw = sqlite3.connect(tmp_path / "index" / "store.sqlite")
    raw.execute("UPDATE items SET source = 'elsewhere' WHERE row = 1")
    raw.execute("UPDATE items SET added_at = 5 WHERE row = 2")
    raw.execute("UPDATE items SET content = 7, crc32 = NULL WHERE row = 4")
    raw.execute("UPDATE previews SET picture = x'00' WHERE row = 0")
    raw.execute("UPDATE previews SET row = 9 WHERE row = 3")
    raw.commit()
    raw.close()
    with Store.open(tmp_path / "index") as store:
        for row in (1, 2, 4):
            with pytest.raises(StoreError, match=f"item {row} of store.sqlite is damaged: restore a copy or build"):
                store.items(np.array([0, row, 3]))
        with pytest.raises(
            StoreError, match="the preview of row 0 is damaged: restore a copy or build the index again"
        ):
            store.preview(0)
        assert "the preview of row 9 is damaged" in store.problems()


def test_a_lost_preview_is_noticed_by_the_check(tmp_path: Path) -> None:
    filled(tmp_path / "index", range(4)).close()
    raw = sqlite3.connect(tmp_path / "index" / "store.sqlite")
    raw.execute("DELETE FROM previews WHERE row = 3")
    raw.commit()
    raw.close()
    with Store.open(tmp_path / "index") as store:
        assert store.problems() == ["store.sqlite: expected 4 previews, found 3"]


@pytest.mark.parametrize("damage", ["text", "cut", "empty"])
def test_a_damaged_database_is_refused(tmp_path: Path, damage: str) -> None:
    filled(tmp_path / "index", range(300)).close()
    path = tmp_path / "index" / "store.sqlite"
    whole = path.read_bytes()
    path.write_bytes({"text": b"no database" * 1000, "cut": whole[: len(whole) // 2], "empty": b""}[damage])
    text = r"damaged store.sqlite \(.*\): restore a copy or build the index again"
    with pytest.raises(StoreError, match=text), Store.open(tmp_path / "index") as store:
        everything(store)


def test_opening_what_is_no_index_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        StoreError, match=r"expected an image index in .*, found no store.sqlite: check the path or build"
    ):
        Store.open(tmp_path)


def test_a_store_is_not_created_over_other_files(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UsageError, match=r"expected a new folder for the index, .* exists: choose another"):
        Store.create(tmp_path, TOY)


def test_another_format_is_refused(tmp_path: Path) -> None:
    filled(tmp_path / "index", range(1)).close()
    raw = sqlite3.connect(tmp_path / "index" / "store.sqlite")
    raw.execute("UPDATE settings SET value = '9' WHERE name = 'format_version'")
    raw.commit()
    raw.close()
    with pytest.raises(StoreError, match="has format 9, this version reads 1 and 2: upgrade knn-diffusion"):
        Store.open(tmp_path / "index")


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("source LIKE '%/1%'", {1, 10, 11}),
        ("key = '3.png' OR key IN ('4.png')", {3, 4}),
        ("added_at < 5", set()),
        ("length(source) > 100 -- nothing", set()),
        ('"KEY" = \'3.png\' OR source = \'"\' OR /* "this" */ "items"."key" = \'4.png\' -- "that"', {3, 4}),
    ],
)
def test_a_condition_selects_rows(where: str, expected: set[int]) -> None:
    with filled(None, range(12)) as store:
        store.remove([content(0)[:16]])
        assert set(np.flatnonzero(store.matching(where)).tolist()) == expected


def test_rows_are_found_by_where_their_images_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SOURCES_AT_ONCE", 3)
    odd = "caf\udce9 'quoted\" \\ \n😀.png"
    with filled(None, range(12)) as store:
        store.append([Item(source=odd, content=content(20)), Item(source=odd, content=content(21))], batch(range(2))[1])
        store.remove([id_of(n) for n in (0, 1, 5)])
        wanted = [odd, "nowhere", *(f"photos/{n}.png" for n in (9, 5, 2, 7, 0))]
        before = store.snapshot()
        assert store.rows_from(wanted, before).tolist() == [2, 7, 9, 12, 13]
        assert store.rows_from([], before).tolist() == []
        store.compact()
        assert store.rows_from(wanted, store.snapshot()).tolist() == [0, 4, 6, 9, 10]
        with pytest.raises(CompactedError):
            store.rows_from(wanted, before)


@pytest.mark.parametrize(
    "where",
    [
        "sorce = 'x'",
        "source LIKE",
        "1); DELETE FROM items; --",
        "row IN (SELECT row FROM previews)",
        "load_extension('x')",
        "\0",
        '"sorce" = 1',
        "\"sorce\" != 'x' -- which SQLite takes for two texts",
        'source LIKE "%2%"',
    ],
)
def test_what_is_no_condition_is_refused_and_changes_nothing(where: str) -> None:
    with filled(None, range(3)) as store:
        with pytest.raises(
            UsageError, match=r"expected a condition over id, source, key, added_at, such as .*: mend it"
        ):
            store.matching(where)
        assert len(everything(store)) == 3


def test_readers_see_only_whole_batches_while_one_writes(tmp_path: Path) -> None:
    wrong: list[str] = []
    done = threading.Event()
    with filled(tmp_path / "index", range(4)) as store:

        def read() -> None:
            while not done.is_set():
                found = everything(store)
                if len(found) % 4 or any(one[3] is None for one in found.values()):
                    wrong.append(f"{len(found)} images")

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for number in range(1, 8):
            store.append(*batch(range(4 * number, 4 * number + 4)))
        done.set()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_copied_store_is_the_same_store(tmp_path: Path) -> None:
    with filled(tmp_path / "index", range(5)) as store:
        expected = everything(store)
    shutil.copytree(tmp_path / "index", tmp_path / "elsewhere")
    with Store.open(tmp_path / "elsewhere") as store:
        assert everything(store) == expected


def test_two_writers_take_turns(tmp_path: Path) -> None:
    Store.create(tmp_path / "index", TOY).close()

    def write(first: int) -> None:
        with Store.open(tmp_path / "index") as store:
            for number in range(first, first + 20, 5):
                store.append(*batch(range(number, number + 5)))

    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 100, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with Store.open(tmp_path / "index") as store:
        found = everything(store)
        assert {one[0] for one in found.values()} == {
            f"photos/{n}.png" for first in (0, 100, 200) for n in range(first, first + 20)
        }
        for number, vector in zip(range(100, 105), batch(range(100, 105))[1], strict=True):
            stored = store.embeddings(store.rows_of([content(number)[:16]]))[0]
            np.testing.assert_allclose(stored, vector / np.linalg.norm(vector), atol=1e-3)
        assert store.problems() == []


ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT 'a' || x AS name, 'b' AS value FROM n"


@pytest.mark.parametrize("table", ["settings", "segments", "items"])
@pytest.mark.parametrize("read_only", [True, False])
def test_a_view_in_the_place_of_a_table_is_refused_before_it_is_read(
    tmp_path: Path, table: str, read_only: bool
) -> None:
    filled(tmp_path / "index", range(2)).close()
    raw = sqlite3.connect(tmp_path / "index" / "store.sqlite")
    raw.executescript(f"DROP TABLE {table}; CREATE VIEW {table} AS {ENDLESS};")
    raw.close()
    with pytest.raises(StoreError, match=f"expected only tables in .*store.sqlite, it holds '{table}', which is none"):
        Store.open(tmp_path / "index", read_only=read_only)


def test_no_memory_is_taken_for_rows_that_no_file_holds(tmp_path: Path) -> None:
    filled(tmp_path / "index", range(2)).close()
    raw = sqlite3.connect(tmp_path / "index" / "store.sqlite")
    raw.execute("UPDATE segments SET num_rows = ?", (2**33,))
    settings, segments = manifest._signed(raw)
    raw.execute("UPDATE settings SET value = ? WHERE name = 'signature'", (manifest._signature(settings, segments),))
    raw.commit()
    raw.close()
    with pytest.raises(StoreError, match=r"is too short for the 8,589,934,592 rows that the database says"):
        Store.open(tmp_path / "index")
