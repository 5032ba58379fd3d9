"""An index folder that somebody else changes: replaced under an open handle, with links and with files of others in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from store_world import DIM, batch, everything, filled, id_of

from knn_diffusion.errors import StoreError
from knn_diffusion.retrieval import stored_array
from knn_diffusion.retrieval.cells import faiss_module
from knn_diffusion.retrieval.compaction import WORKPLACE
from knn_diffusion.retrieval.kept import KeptIndex, Shape
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import Store
from knn_diffusion.retrieval.transaction import new_segment

MOVED = "was moved, deleted or replaced after it was opened here: open the index again where it is now"
SWAPS = ("deleted and built anew", "moved away", "the path is a link that was switched")


def swap(how: str, live: Path, new: Path, old: Path) -> None:
    """Put the index in `new` at the path `live`; the one that was there lies in `old` afterwards, or nowhere."""
    if how == "deleted and built anew":
        shutil.rmtree(live)
        new.rename(live)
    elif how == "moved away":
        live.rename(old)
        new.rename(live)
    else:
        live.unlink()
        live.symlink_to(new)


def begun(how: str, place: Path) -> tuple[Path, Path, Path]:
    """An index at a path, another of five segments to be put there, and the name that the first is given."""
    live, new, old = place / "live", place / "new", place / "old"
    if "link" in how:
        old.mkdir()
        filled(old, range(20)).close()
        live.symlink_to(old)
    else:
        filled(live, range(20)).close()
    filled(new, *(range(start, start + 10) for start in range(100, 150, 10))).close()
    return live, new, old


def sound(folder: Path) -> set[str]:
    """The ids in an index whose every file is what it should be."""
    with Store.open(folder) as store:
        assert store.problems() == []
        return set(everything(store))


CHANGES: dict[str, Callable[[Store], object]] = {
    "append": lambda store: store.append(*batch(range(40, 41))),
    "remove": lambda store: store.remove([id_of(0), id_of(1)]),
    "compact": lambda store: store.compact(),
    "set_setting": lambda store: store.set_setting("note", "theirs"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("wrote", [True, False], ids=["which wrote", "which only read"])
@pytest.mark.parametrize("how", SWAPS)
def test_an_open_handle_leaves_an_index_alone_that_took_the_place_of_its_own(
    tmp_path: Path, how: str, wrote: bool, change: str
) -> None:
    live, new, old = begun(how, tmp_path)
    handle = Store.open(live)
    if wrote:
        handle.append(*batch(range(20, 22)))
        handle.remove([id_of(19)])
    expected = set(everything(handle))
    swap(how, live, new, old)
    with pytest.raises(StoreError, match=MOVED):
        CHANGES[change](handle)
    assert set(everything(handle)) == expected  # what was found can be searched on
    handle.close()
    assert sound(live) == {id_of(number) for number in range(100, 150)}
    if old.exists():
        assert sound(old) == expected


@pytest.mark.parametrize("how", SWAPS)
def test_an_index_replaced_in_the_midst_of_a_change_is_left_alone(tmp_path: Path, how: str) -> None:
    live, new, old = begun(how, tmp_path)
    handle = Store.open(live)

    def change() -> None:
        with handle.live.transaction() as transaction:
            segment = new_segment([b"a line"], np.zeros((1, DIM), np.float16), None)
            segment.number = 2  # as one of the new index
            segment.write(live / "segments")
            transaction.made.append(segment)
            swap(how, live, new, old)

    with pytest.raises(StoreError, match=MOVED):
        change()
    handle.close()
    assert sound(live) == {id_of(number) for number in range(100, 150)}


def test_a_replaced_index_keeps_the_journal_that_its_own_writer_has_open(tmp_path: Path) -> None:
    live, new, old = begun("moved away", tmp_path)
    handle = Store.open(live)
    handle.append(*batch(range(20, 22)))
    swap("moved away", live, new, old)
    with Store.open(live) as theirs:
        theirs.append(*batch(range(200, 203)))
        handle.close()
        assert (live / "store.sqlite-wal").stat().st_size > 0
        with Store.open(live) as third:
            assert len(third) == 53
    assert len(sound(live)) == 53


def test_an_index_that_was_renamed_is_not_called_damaged(tmp_path: Path) -> None:
    with filled(tmp_path / "live", range(5)) as handle:
        (tmp_path / "live").rename(tmp_path / "elsewhere")
        for change in CHANGES.values():
            with pytest.raises(StoreError, match=MOVED):
                change(handle)
        assert len(everything(handle)) == 5
    assert len(sound(tmp_path / "elsewhere")) == 5


@pytest.mark.parametrize("folder", [True, False], ids=["in a folder", "in memory"])
def test_a_closed_index_is_not_called_damaged(tmp_path: Path, folder: bool) -> None:
    store = filled(tmp_path / "index" if folder else None, range(5))
    store.close()
    for use in (*CHANGES.values(), len, lambda one: one.rows_of(["x"]), lambda one: one.matching("id = 'x'")):
        if folder or use is not CHANGES["compact"]:
            with pytest.raises(StoreError, match=r"was closed here: open it again"):
                use(store)


def test_files_of_others_in_an_index_folder_are_never_deleted(tmp_path: Path) -> None:
    with filled(tmp_path / "index", range(5), range(5, 8)) as store:
        kept = [
            tmp_path / "index" / name
            for name in ("README", "segments/README.md", "segments/00000009.notes.txt", "segments/photo.npy",
                         f"{WORKPLACE}notes/diary.txt", f"{WORKPLACE}notes/00000001.txt", "segments/old/a.npy")
        ]  # fmt: skip
        for file in kept:
            file.parent.mkdir(exist_ok=True)
            file.write_text("mine")
        store.append(*batch(range(10, 12)))
        store.remove([id_of(0)])
        store.compact()
        store.append(*batch(range(12, 14)))
        assert [file.read_text() for file in kept] == ["mine"] * len(kept)
        assert store.problems() == []


@pytest.mark.parametrize("name", ["store.sqlite-wal", "store.sqlite-journal", "store.sqlite-shm"])
def test_a_journal_that_is_a_link_is_refused(tmp_path: Path, name: str) -> None:
    filled(tmp_path / "index", range(5)).close()
    (tmp_path / "diary").write_bytes(b"mine" * 999)
    (tmp_path / "index" / name).symlink_to(tmp_path / "diary")
    with pytest.raises(StoreError, match=f"{name} is a link to .*diary"):
        Store.open(tmp_path / "index")
    assert (tmp_path / "diary").read_bytes() == b"mine" * 999


@pytest.mark.parametrize("name", ["segments", "cache", "store.sqlite"])
def test_nothing_is_written_or_deleted_through_a_link_in_an_index_folder(tmp_path: Path, name: str) -> None:
    filled(tmp_path / "index", range(5)).close()
    place, outside = tmp_path / "index" / name, tmp_path / "outside"
    if place.exists():
        place.rename(outside)
    else:
        outside.mkdir()
    if outside.is_dir():
        (outside / "00000077.embeddings.npy").write_bytes(b"precious")
    place.symlink_to(outside)
    before = {path: path.read_bytes() for path in [outside, *outside.glob("*")] if path.is_file()}
    with Store.open(tmp_path / "index") as store:
        assert store.read_only
        assert len(store) == 5
        store.append(*batch(range(5, 7)))  # in memory
    with pytest.raises(StoreError, match="read-only"), Store.open(tmp_path / "index") as store:
        store.compact()
    assert {path: path.read_bytes() for path in before} == before
    assert [path.name for path in outside.parent.iterdir() if path.name.startswith("outside")] == ["outside"]


def test_a_link_laid_into_an_open_index_is_refused(tmp_path: Path) -> None:
    with filled(tmp_path / "index", range(5)) as store:
        (tmp_path / "index" / "segments").rename(tmp_path / "outside")
        (tmp_path / "index" / "segments").symlink_to(tmp_path / "outside")
        (tmp_path / "outside" / "00000077.embeddings.npy").write_bytes(b"precious")
        before = sorted(tmp_path.glob("outside/*"))
        for change in CHANGES.values():
            with pytest.raises(
                StoreError, match=r"segments is a link to .*outside: replace the link by what it points"
            ):
                change(store)
        assert sorted(tmp_path.glob("outside/*")) == before


def test_the_note_of_a_writer_follows_no_link(tmp_path: Path) -> None:
    (tmp_path / "diary").write_text("mine")
    with filled(tmp_path / "index", range(5)) as store:
        (tmp_path / "index" / "writer.json").symlink_to(tmp_path / "diary")
        store.append(*batch(range(5, 7)))
    assert (tmp_path / "diary").read_text() == "mine"


def test_a_compaction_leaves_the_workplace_of_another_one_alone(tmp_path: Path) -> None:
    with filled(tmp_path / "index", range(5), range(5, 8)) as store, Store.open(tmp_path / "index") as other:
        store.remove([id_of(1)])
        seen: list[list[Path]] = []

        def look(*_: object) -> None:
            before = list((tmp_path / "index").glob(f"{WORKPLACE}*/*.npy"))
            assert before
            other.compact()
            seen.append([path for path in before if not path.exists()])

        with pytest.raises(StoreError, match="another compaction was faster"):
            store.compact(look)
        assert seen == [[]]
        assert sound(tmp_path / "index") == {id_of(number) for number in range(8) if number != 1}


def test_a_snapshot_that_cannot_map_its_files_says_that_their_folder_was_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path / "live", range(5)).close()
    real = stored_array.map_bytes
    monkeypatch.setattr(stored_array, "map_bytes", lambda path: (_ for _ in ()).throw(RuntimeError("too many maps")))
    with Store.open(tmp_path / "live") as store:
        snapshot: Snapshot = store.snapshot()
        monkeypatch.setattr(stored_array, "map_bytes", real)
        (tmp_path / "live").rename(tmp_path / "elsewhere")
        with pytest.raises(StoreError, match=r"segments is not there any more: open the index again where it is now"):
            snapshot.embeddings(snapshot.live_rows)


def test_files_of_others_in_the_cache_are_never_deleted(tmp_path: Path) -> None:
    with filled(tmp_path / "index", range(5)) as store:
        kept = KeptIndex.open(store, Shape(layout="flat", cells=1, dim=DIM))
        mine, stale = (tmp_path / "index" / "cache" / f"search-{name}.faiss" for name in ("mine", "0" * 16))
        mine.parent.mkdir()
        for file in (mine, stale):
            file.write_text("mine")
        kept.keep_trained(faiss_module().IndexFlatIP(DIM), store.snapshot())
        assert mine.exists()
        assert not stale.exists()


def test_the_cache_of_an_index_that_took_the_place_of_another_is_left_alone(tmp_path: Path) -> None:
    live, new, old = begun("moved away", tmp_path)
    with Store.open(live) as store:
        kept = KeptIndex.open(store, Shape(layout="flat", cells=1, dim=DIM))
        (new / "cache").mkdir()
        (new / "cache" / f"search-{'0' * 16}.faiss").write_text("theirs")
        swap("moved away", live, new, old)
        kept.keep_trained(faiss_module().IndexFlatIP(DIM), store.snapshot())
        assert kept.trouble is not None
    assert [file.name for file in (live / "cache").iterdir()] == [f"search-{'0' * 16}.faiss"]
