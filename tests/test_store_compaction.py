"""A compaction takes removed images off the disk and changes nothing else; whoever reads or writes meanwhile goes on."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from store_world import TOY, batch, content, everything, filled, id_of

from knn_diffusion.cli import main
from knn_diffusion.errors import KnnDiffusionError, StoreError
from knn_diffusion.retrieval import compaction, segments
from knn_diffusion.retrieval.records import Records
from knn_diffusion.retrieval.segments import CompactedError
from knn_diffusion.retrieval.store import Store


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compaction, "SEGMENT_ROWS", 8)
    monkeypatch.setattr(segments, "SEGMENT_ROWS", 8)


def ids(*numbers: int) -> list[str]:
    return [id_of(number) for number in numbers]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def test_removed_images_leave_the_disk_and_all_else_stays(tmp_path: Path) -> None:
    with filled(tmp_path / "index", range(5), range(5, 10), range(10, 12)) as store:
        store.set_setting("note", "kept")
        store.remove(ids(0, 3, 6, 11))
        before, times = (
            everything(store),
            store.live.query("SELECT row, id, added_at FROM items WHERE deleted_at IS NULL ORDER BY row"),
        )
        store.compact()
        assert everything(store) == before
        assert store.live.query("SELECT row, id, added_at FROM items ORDER BY row") == times
        assert store.snapshot().num_rows == len(store) == 8
        assert store.setting("note") == "kept"
        assert store.problems() == []
    removed = content(3)
    files = [path for path in (tmp_path / "index").rglob("*") if path.is_file()]
    assert not any(bytes.fromhex(removed) in path.read_bytes() or b"picture 3" in path.read_bytes() for path in files)
    assert sorted(path.name for path in files) == [
        "00000004.embeddings.npy", "00000004.thumbnails.npy", "store.sqlite"
    ]  # fmt: skip
    with Store.open(tmp_path / "index") as store:
        assert everything(store) == before
        assert store.problems() == []


def test_rows_are_numbered_anew_and_the_generation_and_digest_say_so() -> None:
    with filled(None, range(6)) as store:
        store.remove(ids(1, 2))
        before = store.snapshot()
        store.compact()
        after = store.snapshot()
        assert (before.generation, after.generation) == (0, 1)
        assert before.digest(len(before.segments)) != after.digest(len(after.segments))
        assert store.rows_of(ids(0, 1, 3, 5)).tolist() == [0, -1, 1, 3]
        assert set(before.numbers).isdisjoint(after.numbers)


def test_the_generation_is_kept(tmp_path: Path) -> None:
    with filled(tmp_path / "index", range(4)) as store:
        for number in range(3):
            store.remove(ids(number))
            store.compact()
    with Store.open(tmp_path / "index") as store:
        assert store.snapshot().generation == 3
        store.append(*batch(range(9, 10)))
        assert store.snapshot().generation == 3
        assert store.rows_of(ids(3, 9)).tolist() == [0, 1]


def test_a_store_without_waste_is_left_alone(tmp_path: Path) -> None:
    with filled(tmp_path / "index", range(8), range(8, 14)) as store:
        before, files = store.snapshot(), sorted((tmp_path / "index" / "segments").iterdir())
        assert not store.waste().worthwhile
        store.compact()
        assert store.snapshot().generation == before.generation == 0
        assert sorted((tmp_path / "index" / "segments").iterdir()) == files


def test_only_what_is_wasteful_is_written_again() -> None:
    with filled(None, range(8), range(8, 16), range(16, 24), range(24, 26), range(26, 28)) as store:
        store.remove(ids(9))
        first, _, third, *_ = store.snapshot().segments
        expected = everything(store)
        store.compact()
        after = store.snapshot()
        assert after.segments[0].number == first.number
        assert after.segments[2].number == third.number
        assert [(segment.first_row, segment.num_rows) for segment in after.segments] == [
            (0, 8),
            (8, 7),
            (15, 8),
            (23, 4),
        ]
        assert after.digest(1) == store.snapshot().digest(1)
        assert everything(store) == expected
        assert store.problems() == []


def test_pictures_are_not_made_up_for_images_without() -> None:
    items, vectors, _, _ = batch(range(10, 12))
    with filled(None, range(2), range(2, 4)) as store:
        store.append(items, vectors)
        store.append(*batch(range(20, 22)))
        store.compact()
        assert store.thumbnails(np.arange(8))[1].tolist() == [True] * 4 + [False] * 2 + [True] * 2
        assert [segment.num_rows for segment in store.snapshot().segments] == [4, 2, 2]


def test_everything_can_be_removed(tmp_path: Path) -> None:
    with filled(tmp_path / "index", range(3)) as store:
        used = store.snapshot().numbers
        store.remove(ids(0, 1, 2))
        store.compact()
        assert len(store) == store.snapshot().num_rows == 0
        assert store.problems() == []
        store.append(*batch(range(1, 2)))
        assert set(store.snapshot().numbers).isdisjoint(used)
        assert set(everything(store)) == set(ids(1))


def test_the_waste_is_told_beforehand(tmp_path: Path) -> None:
    with filled(tmp_path / "index", range(6), range(6, 12)) as store:
        store.remove(ids(0, 1, 2))
        before, waste = size_of(tmp_path / "index" / "segments"), store.waste()
        assert (waste.rows, waste.removed, waste.segments, waste.segments_after) == (12, 3, 2, 2)
        assert waste.share == 0.25
        assert waste.worthwhile
        assert waste.bytes_freed == 3 * (2 * TOY.dim + 192)
        store.compact()
        assert before - size_of(tmp_path / "index" / "segments") == waste.bytes_freed


def test_room_in_the_database_is_given_back(tmp_path: Path) -> None:
    items, vectors, pictures, _ = batch(range(60))
    with Store.create(tmp_path / "index", TOY) as store:
        store.append(items, vectors, pictures, [bytes([n]) * 20_000 for n in range(60)])
        store.remove(ids(*range(50)))
        expected = store.waste().bytes_freed
        assert expected > 900_000
        store.compact()
    assert (tmp_path / "index" / "store.sqlite").stat().st_size < 400_000


def test_an_older_snapshot_reads_on(tmp_path: Path) -> None:
    with filled(tmp_path / "index", range(5)) as writer, Store.open(tmp_path / "index") as reader:
        old, other = writer.snapshot(), reader.snapshot()
        vectors = writer.embeddings(np.arange(5), old)
        writer.remove(ids(1))
        writer.compact()
        assert not (tmp_path / "index" / "segments" / "00000001.embeddings.npy").exists()
        for store, snapshot in ((writer, old), (reader, other)):
            np.testing.assert_array_equal(store.embeddings(np.arange(5), snapshot), vectors)
            assert store.thumbnails(np.arange(5), snapshot)[0][:, 0].tolist() == [0, 1, 2, 3, 4]
            assert [item.id for item in store.items(np.array([4, 2]), snapshot)] == ids(4, 2)
            assert store.preview(4, snapshot) == b"picture 4"
            assert store.rows_of(ids(4, 3), snapshot).tolist() == [4, 3]
            assert store.rows_of(ids(4, 3)).tolist() == [3, 2]


def test_what_an_older_snapshot_cannot_know_any_more_is_said() -> None:
    with filled(None, range(5)) as store:
        old = store.snapshot()
        store.remove(ids(1))
        assert [item.id for item in store.items(np.arange(5), old)] == ids(0, 1, 2, 3, 4)
        assert store.rows_of(ids(1, 2), old).tolist() == [1, 2]
        store.compact()
        for ask in (
            lambda: store.items(np.arange(5), old),
            lambda: store.rows_of(ids(1), old),
            lambda: store.matching("added_at > 0", old),
        ):
            with pytest.raises(CompactedError, match="was compacted meanwhile: take a new snapshot and ask again"):
                ask()


def test_asking_again_gives_the_new_state() -> None:
    with filled(None, range(5)) as store:
        seen: list[int] = []

        def read(snapshot: segments.Snapshot) -> list[str]:
            seen.append(snapshot.generation)
            if len(seen) == 1:
                store.remove(ids(1))
                store.compact()
            return [item.id for item in store.items(snapshot.live_rows, snapshot)]

        assert store.consistently(read) == ids(0, 2, 3, 4)
        assert seen == [0, 1]


@pytest.mark.parametrize("where", ["in memory", "in a folder"])
def test_images_added_and_removed_during_a_compaction_are_kept_and_gone(tmp_path: Path, where: str) -> None:
    with filled(tmp_path / "index" if where == "in a folder" else None, range(5), range(5, 8)) as store:

        def told(what: str, done: int, total: int) -> None:
            store.append(*batch(range(20, 23)))
            store.remove(ids(2, 6))

        store.remove(ids(1))
        store.compact(told)
        assert set(everything(store)) == set(ids(0, 3, 4, 5, 7, 20, 21, 22))
        assert store.snapshot().num_rows == 10
        assert store.problems() == []
        store.compact()
        assert set(everything(store)) == set(ids(0, 3, 4, 5, 7, 20, 21, 22))
        assert store.snapshot().num_rows == 8
        assert store.problems() == []


def test_the_slower_of_two_compactions_changes_nothing(tmp_path: Path) -> None:
    with filled(tmp_path / "index", range(5), range(5, 8)) as store, Store.open(tmp_path / "index") as other:
        store.remove(ids(1))
        expected = everything(store)
        with pytest.raises(KnnDiffusionError, match="nothing was changed"):
            store.compact(lambda *_: other.compact() and None)
        assert everything(store) == everything(other) == expected
        assert store.problems() == []
        assert not list((tmp_path / "index").glob("compacting-*"))


def test_what_a_killed_compaction_left_is_deleted(tmp_path: Path) -> None:
    with filled(tmp_path / "index", range(5)) as store:
        left = tmp_path / "index" / "compacting-left"
        left.mkdir()
        (left / "00000000.embeddings.npy").write_bytes(b"torn")
        store.remove(ids(1))
        store.compact()
        assert not left.exists()


def test_damage_is_not_signed_anew(tmp_path: Path) -> None:
    filled(tmp_path / "index", range(5)).close()
    raw = sqlite3.connect(tmp_path / "index" / "store.sqlite")
    raw.execute("UPDATE items SET source = 'elsewhere', crc32 = NULL WHERE row = 1")
    raw.commit()
    raw.close()
    with Store.open(tmp_path / "index") as store:
        store.remove(ids(0))
        with pytest.raises(
            StoreError, match="the items of segment 1 are not those that were added.*nothing was changed"
        ):
            store.compact()
        assert store.snapshot().num_rows == 5


def test_a_read_only_store_is_not_compacted(tmp_path: Path) -> None:
    filled(tmp_path / "index", range(5)).close()
    with (
        Store.open(tmp_path / "index", read_only=True) as store,
        pytest.raises(StoreError, match="is read-only: save a copy, which leaves out what is removed"),
    ):
        store.compact()


def test_a_copy_of_a_compacted_store_is_the_same_store(tmp_path: Path) -> None:
    with filled(tmp_path / "index", range(5), range(5, 12)) as store:
        store.remove(ids(1, 8))
        store.compact()
        expected, times = everything(store), store.live.query("SELECT added_at FROM items ORDER BY row")
        (tmp_path / "copy").mkdir()
        store.copy_to(tmp_path / "copy")
    with Store.open(tmp_path / "copy") as copy:
        assert everything(copy) == expected
        assert copy.live.query("SELECT added_at FROM items ORDER BY row") == times
        assert copy.snapshot().generation == 0
        assert copy.problems() == []


def test_a_store_of_format_1_is_read_and_becomes_one_of_this_format_when_it_is_written(tmp_path: Path) -> None:
    with filled(tmp_path / "index", range(5)) as store:
        store.remove(ids(4))
        expected = everything(store)
    raw = sqlite3.connect(tmp_path / "index" / "store.sqlite")
    raw.executescript(
        "DROP TABLE purged; DROP TABLE blocks; ALTER TABLE items DROP COLUMN crc32; UPDATE settings SET value = '1' WHERE name = "
        "'format_version'; DELETE FROM settings WHERE name NOT IN ('format_version', 'encoder', 'sealed');"
    )
    raw.close()
    with Store.open(tmp_path / "index") as store:
        assert everything(store) == expected
        store.append(*batch(range(7, 9)))
        store.remove(ids(0))
        store.compact()
        assert set(everything(store)) == set(ids(1, 2, 3, 7, 8))
    with Store.open(tmp_path / "index") as store:
        assert set(everything(store)) == set(ids(1, 2, 3, 7, 8))
        assert store.setting("format_version") == "2"
        assert store.problems() == []


def test_the_command_says_what_left_the_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with filled(tmp_path / "index", range(5)) as store:
        store.remove(ids(0, 1))
    assert main(["index", "compact", str(tmp_path / "index"), "--json"]) == 0
    assert '"count": 3, "removed": 2' in capsys.readouterr().out
    with Store.open(tmp_path / "index") as store:
        assert store.snapshot().num_rows == 3
    assert main(["index", "compact", str(tmp_path / "index")]) == 0
    assert "0 removed images" in capsys.readouterr().out


def test_readers_see_only_whole_states_while_images_come_and_go_and_rows_are_renumbered(tmp_path: Path) -> None:
    wrong: list[str] = []
    done = threading.Event()
    with filled(tmp_path / "index", range(4)) as store:

        def read() -> None:
            try:
                while not done.is_set():
                    found = {
                        int(one[0].split("/")[1][:-4])
                        for one in store.consistently(lambda now: everything(store, now)).values()
                    }
                    if len(found) % 4 or any(
                        number - number % 4 + place not in found for number in found for place in range(4)
                    ):
                        wrong.append(f"images {sorted(found)}")
            except Exception as error:
                wrong.append(repr(error))

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            for number in range(1, 12):
                store.append(*batch(range(4 * number, 4 * number + 4)))
                store.remove(ids(*range(4 * number - 4, 4 * number)))
                if number % 3 == 0:
                    store.compact()
        finally:
            done.set()
            for thread in threads:
                thread.join()
    assert wrong == []


# Rows and records


@given(st.lists(st.integers(0, 60), unique=True), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_rows_are_the_records_that_are_left(gone: list[int], times: int) -> None:
    records, left = Records.complete(), np.arange(80)
    for part in np.array_split(np.array(sorted(gone), np.int64), times):
        records = records.without(part)
        left = np.setdiff1d(left, part)
        np.testing.assert_array_equal(records.of_rows(np.arange(len(left))), left)
        expected = np.full(80, -1)
        expected[left] = np.arange(len(left))
        np.testing.assert_array_equal(records.rows_of(np.arange(80)), expected)
        assert records.num_purged == 80 - len(left)
        assert [records.row_from(record) for record in range(81)] == [
            int((left < record).sum()) for record in range(81)
        ]
        assert np.flatnonzero(records.spread(np.arange(len(left)) % 2 == 0)).tolist() == left[::2].tolist()
        assert (records.firsts[1:] > (records.firsts + records.counts)[:-1]).all()


class Machine(RuleBasedStateMachine):
    """Whatever is done in whatever order, the store equals a dictionary."""

    root = Path()
    number = 0

    @initialize()
    def begin(self) -> None:
        Machine.number += 1
        self.folder = self.root / str(Machine.number)
        self.store = Store.create(self.folder, TOY)
        self.model: dict[str, int] = {}

    @rule(numbers=st.sets(st.integers(0, 30), min_size=1, max_size=6))
    def add(self, numbers: set[int]) -> None:
        items, vectors, pictures, previews = batch(sorted(numbers))
        added = self.store.append(items, vectors, pictures, previews)
        assert added.tolist() == [id_of(number) not in self.model for number in sorted(numbers)]
        self.model |= {id_of(number): number for number in sorted(numbers) if id_of(number) not in self.model}

    @rule(numbers=st.sets(st.integers(0, 30), min_size=1, max_size=4))
    def remove(self, numbers: set[int]) -> None:
        known = [id_of(number) for number in numbers if id_of(number) in self.model]
        self.store.remove(known)
        self.model = {id_: number for id_, number in self.model.items() if id_ not in known}

    @rule()
    def compact(self) -> None:
        self.store.compact()
        assert self.store.snapshot().num_rows == len(self.model)
        assert not self.store.waste().removed

    @rule()
    def reopen(self) -> None:
        self.store.close()
        self.store = Store.open(self.folder)

    @invariant()
    def holds_what_the_dictionary_holds(self) -> None:
        if hasattr(self, "store"):
            assert everything(self.store) == {id_: told(number) for id_, number in self.model.items()}
            assert list(everything(self.store)) == list(self.model)
            rows = self.store.rows_of([*self.model, "nobody"])
            assert rows.tolist() == [*self.store.snapshot().live_rows.tolist(), -1]

    def teardown(self) -> None:
        if hasattr(self, "store"):
            assert self.store.problems() == []
            self.store.close()


def told(number: int) -> tuple[str, bytes, bytes, bytes | None]:
    items, vectors, pictures, previews = batch([number])
    unit = (vectors[0].astype(np.float64) / np.linalg.norm(vectors[0].astype(np.float64))).astype(np.float32)
    return items[0].source, unit.astype(np.float16).tobytes(), pictures[0].tobytes(), previews[0]


def test_any_order_of_changes_keeps_the_store_right(tmp_path: Path) -> None:
    Machine.root = tmp_path
    machine = Machine.TestCase
    machine.settings = settings(
        max_examples=6, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    machine("runTest").runTest()
