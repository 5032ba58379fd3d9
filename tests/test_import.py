"""Embeddings of other tools: read with what is known of them, listed when unusable, refused when damaged."""

from __future__ import annotations

import json
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embedding_files import DIM, MADE_BY, facts, filled, imported, stopping_after, vectors, write_clip_folder

from knn_diffusion.errors import FingerprintError, MissingDependencyError, StoreError, UsageError
from knn_diffusion.retrieval.interchange import (
    export_vectors,
    find_vectors,
    import_vectors,
    reading,
    tables,
    writing,
)
from knn_diffusion.retrieval.store import Store


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    return write_clip_folder(tmp_path / "clip")


# What others wrote is read


def test_a_clip_retrieval_folder_is_read_with_its_provenance(clip_folder: Path) -> None:
    store, report = imported(clip_folder)
    found = facts(store)
    assert (report.added, report.num_skipped) == (30, 0)
    assert [one[-1] for one in found] == [row.tobytes() for row in vectors(30).astype(np.float16)]
    assert [one[1] for one in found[:2]] == ["000000000", "https://example.org/1.jpg"]
    assert [one[2] for one in found] == [f"{n:09}" for n in range(30)]
    assert all(one[0] == one[3][:16] for one in found)  # the column id is not ours, so ids come from the vectors


def test_files_are_paired_and_ordered_by_their_number(tmp_path: Path) -> None:
    from pyarrow import parquet, table

    (tmp_path / "images").mkdir()
    (tmp_path / "metadata").mkdir()
    rows = vectors(12)
    for number in range(12):  # LAION's folders: "images", numbers without leading zeros
        np.save(tmp_path / "images" / f"img_emb_{number}.npy", rows[number : number + 1])
        parquet.write_table(table({"key": [str(number)]}), tmp_path / "metadata" / f"metadata_{number:04}.parquet")
    found = facts(imported(tmp_path)[0])
    assert [one[2] for one in found] == [str(number) for number in range(12)]
    assert [one[1] for one in found] == [f"img_emb_{number}.npy::0" for number in range(12)]


def test_plain_files_take_ids_and_provenance_from_beside(tmp_path: Path) -> None:
    rows = vectors(5)
    np.save(tmp_path / "a.npy", rows[:2])
    np.save(tmp_path / "b.npy", rows[2:].astype(np.float64))
    (tmp_path / "ids.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\nthree\n\nfive")
    lines = [{"image_path": f"{n}.jpg", "key": n, "more": [n]} for n in range(5)]
    (tmp_path / "told.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    options = {"ids": tmp_path / "ids.txt", "provenance": tmp_path / "told.jsonl"}
    store, report = imported([tmp_path / "a.npy", tmp_path / "b.npy"], **options)
    found = facts(store)
    assert [one[0] for one in found] == ["one", "two", "three", found[3][3][:16], "five"]
    assert [one[1:3] for one in found] == [(f"{n}.jpg", str(n)) for n in range(5)]
    assert report.added == 5
    assert facts(imported(str(tmp_path / "?.npy"), **options)[0]) == found


@pytest.mark.parametrize("ids", [np.arange(7, 12), np.array(list("vwxyz")), np.array([b"v", b"w", b"x", b"y", b"z"])])
def test_ids_may_be_an_array(tmp_path: Path, ids: np.ndarray) -> None:
    np.save(tmp_path / "vectors.npy", vectors(5))
    np.save(tmp_path / "ids.npy", ids)
    found = facts(imported(tmp_path, ids=tmp_path / "ids.npy")[0])
    assert [one[0] for one in found] == (list("vwxyz") if ids.dtype.kind in "US" else ["7", "8", "9", "10", "11"])


def test_vectors_alone_are_named_by_file_and_row(tmp_path: Path) -> None:
    for name in ("part10.npy", "part9.npy"):
        np.save(tmp_path / name, vectors(2, seed=len(name)))
    found = facts(imported(tmp_path)[0])
    assert [one[1] for one in found] == ["part9.npy::0", "part9.npy::1", "part10.npy::0", "part10.npy::1"]


def test_other_byte_orders_and_column_order_are_read(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.asfortranarray(vectors(4).astype(">f4")))
    assert [one[-1] for one in facts(imported(tmp_path)[0])] == [row.tobytes() for row in vectors(4).astype(np.float16)]


def test_a_batch_may_reach_over_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BATCH_ROWS", 7)
    for number in range(5):
        np.save(tmp_path / f"{number}.npy", vectors(3, seed=number))
    np.save(tmp_path / "0.npy", np.zeros((0, DIM), np.float32))
    store, report = imported(tmp_path)
    assert [segment.num_rows for segment in store.snapshot().segments] == [7, 5]
    assert report.rows == 12


def test_batches_of_wide_vectors_are_shorter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BATCH_VALUES", 3 * DIM)
    np.save(tmp_path / "a.npy", vectors(7))
    assert [segment.num_rows for segment in imported(tmp_path)[0].snapshot().segments] == [3, 3, 1]


@pytest.mark.parametrize(("value", "dtype"), [(1e-30, "f4"), (1e30, "f4"), (6e-8, "f2"), (6e4, "f2"), (1e-100, "f8")])
def test_vectors_of_any_length_are_made_units(tmp_path: Path, value: float, dtype: str) -> None:
    np.save(tmp_path / "a.npy", np.array([[value, 0, 0, value, 0, 0, 0, 0]], dtype))
    found = np.frombuffer(facts(imported(tmp_path)[0])[0][-1], np.float16)
    assert np.allclose(found, [0.7071, 0, 0, 0.7071, 0, 0, 0, 0], atol=1e-3)


# What cannot be used is listed


def test_unusable_and_repeated_vectors_are_listed_or_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BATCH_ROWS", 4)
    rows = vectors(10)
    rows[1], rows[2, 3], rows[5, 0], rows[8], rows[9] = 0, np.nan, np.inf, 2 * rows[0], rows[3]
    np.save(tmp_path / "a.npy", rows)
    store, report = imported(tmp_path)
    assert [(one.source, one.reason) for one in report.skipped] == [
        ("a.npy::1", "zero vector"), ("a.npy::2", "not finite"), ("a.npy::5", "not finite"),
    ]  # fmt: skip
    assert (report.added, report.already_present, report.num_skipped) == (5, 2, 3)
    assert [one[1] for one in facts(store)] == [f"a.npy::{n}" for n in (0, 3, 4, 6, 7)]
    assert store.problems() == []


def test_an_id_that_belongs_to_another_vector_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "BATCH_ROWS", 3)
    rows = vectors(6)
    rows[4] = rows[0]
    np.save(tmp_path / "a.npy", rows)
    (tmp_path / "ids.txt").write_text(
        "x\nx\ny\ny\nx\nz\n"
    )  # taken in the same batch, in one before; the same vector again
    store, report = imported(tmp_path, ids=tmp_path / "ids.txt")
    reason = "its id belongs to another vector"
    assert [(one.source, one.reason) for one in report.skipped] == [
        ("a.npy::1", f"{reason}: x"), ("a.npy::3", f"{reason}: y"),
    ]  # fmt: skip
    assert report.reasons == {reason: 2}
    assert [one[0] for one in facts(store)] == ["x", "y", "z"]
    assert report.already_present == 1


def test_the_list_of_skipped_vectors_stays_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "SKIPPED_LISTED", 3)
    np.save(tmp_path / "a.npy", np.concatenate([np.zeros((50, DIM), np.float32), vectors(1)]))
    report = imported(tmp_path)[1]
    assert (report.num_skipped, len(report.skipped), report.reasons) == (50, 3, {"zero vector": 50})


# Interruptions


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_an_interrupted_import_goes_on_where_it_was(
    clip_folder: Path, tmp_path: Path, stop_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BATCH_ROWS", 8)
    store, files = Store.create(tmp_path / "index", MADE_BY), find_vectors(clip_folder)
    with pytest.raises(KeyboardInterrupt):
        import_vectors(store, files, progress=stopping_after(stop_after))
    assert len(store) == 8 * stop_after
    store.close()
    with Store.open(tmp_path / "index") as again:
        report = import_vectors(again, files)
        assert (report.resumed_at, report.added, report.already_present) == (8 * stop_after, 30 - 8 * stop_after, 0)
        assert facts(again) == facts(imported(clip_folder)[0])


def test_a_batch_that_was_saved_but_not_noted_is_not_doubled(
    clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BATCH_ROWS", 8)
    store, files = Store.create(None, MADE_BY), find_vectors(clip_folder)
    with monkeypatch.context() as broken:

        def fail(*_: object) -> None:
            raise KeyboardInterrupt

        broken.setattr(store, "set_setting", fail)
        with pytest.raises(KeyboardInterrupt):
            import_vectors(store, files)
    report = import_vectors(store, files)
    assert (report.resumed_at, report.added, report.already_present) == (0, 22, 8)
    assert facts(store) == facts(imported(clip_folder)[0])


def test_an_import_goes_through_changed_files_from_their_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BATCH_ROWS", 2)
    np.save(tmp_path / "a.npy", vectors(6))
    store = Store.create(None, MADE_BY)
    with pytest.raises(KeyboardInterrupt):
        import_vectors(store, find_vectors(tmp_path), progress=stopping_after(2))
    np.save(tmp_path / "a.npy", np.concatenate([vectors(1, seed=9), vectors(6)]))
    report = import_vectors(store, find_vectors(tmp_path))
    assert (report.resumed_at, report.added, report.already_present) == (0, 3, 4)


def test_a_finished_import_run_again_adds_nothing_and_brings_back_what_was_removed(clip_folder: Path) -> None:
    store, _ = imported(clip_folder)
    before = facts(store)
    again = import_vectors(store, find_vectors(clip_folder))
    assert (again.added, again.already_present, facts(store)) == (0, 30, before)
    store.remove([before[3][0]])
    assert import_vectors(store, find_vectors(clip_folder)).added == 1


def test_progress_tells_rows_done_and_in_all(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BATCH_ROWS", 20)
    monkeypatch.setattr(writing, "BATCH_ROWS", 16)
    told: list[tuple[str, int, int]] = []
    store = Store.create(None, MADE_BY)
    import_vectors(store, find_vectors(clip_folder), progress=lambda *what: told.append(what))
    export_vectors(store, tmp_path / "out", progress=lambda *what: told.append(what))
    assert told == [
        ("importing embeddings", 20, 30), ("importing embeddings", 30, 30),
        ("exporting embeddings", 16, 30), ("exporting embeddings", 30, 30),
    ]  # fmt: skip


# Hostile and damaged files


class Hostile:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('code of a file was run')",)


def hostile_array(path: Path) -> None:
    np.save(path, np.array([Hostile()], dtype=object), allow_pickle=True)


def pickle_file(path: Path) -> None:
    path.write_bytes(pickle.dumps(Hostile()))


def truncated(path: Path) -> None:
    np.save(path, vectors(50))
    path.write_bytes(path.read_bytes()[:-100])


def with_header(header: str) -> Any:
    def write(path: Path) -> None:
        text = header.encode().ljust(117) + b"\n"
        path.write_bytes(b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(64))

    return write


DAMAGED: dict[str, Any] = {
    "objects": hostile_array,
    "a pickle": pickle_file,
    "cut short": truncated,
    "empty": lambda path: path.write_bytes(b""),
    "only a head": lambda path: path.write_bytes(b"\x93NUMPY"),
    "an archive": lambda path: path.write_bytes(b"PK\x03\x04 no archive"),
    "text": lambda path: path.write_text("1 2 3"),
    "one row": lambda path: np.save(path, np.ones(8, np.float32)),
    "whole numbers": lambda path: np.save(path, np.ones((2, 8), np.int8)),
    "records": lambda path: np.save(path, np.zeros((2, 2), [("a", "f4")])),
    "no width": lambda path: np.save(path, np.ones((2, 0), np.float32)),
    "absurd": with_header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**18}, 512), }}"),
    "beyond numbers": with_header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**30}, 512), }}"),
    "negative": with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-2, 8), }"),
    "code": with_header("{'descr': '<f4', 'fortran_order': False, 'shape': (exit(), 8), }"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_files_that_are_no_vectors_are_refused(tmp_path: Path, kind: str) -> None:
    DAMAGED[kind](tmp_path / "a.npy")
    with pytest.raises(StoreError, match=r"a\.npy.*(expected|is damaged or of another kind)") as caught:
        find_vectors(tmp_path / "a.npy")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["objects", "a pickle", "cut short", "empty", "an archive"])
def test_damaged_lists_of_ids_are_refused(tmp_path: Path, kind: str) -> None:
    np.save(tmp_path / "vectors.npy", vectors(50))
    DAMAGED[kind](tmp_path / "ids.npy")
    with pytest.raises(StoreError, match=r"ids\.npy"):
        find_vectors(tmp_path / "vectors.npy", ids=tmp_path / "ids.npy")


def test_tables_with_another_number_of_rows_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    np.save(clip_folder / "img_emb" / "img_emb_1.npy", vectors(19))
    with pytest.raises(
        StoreError, match=r"metadata_1\.parquet: expected a row for each of the 19 vectors of img_emb_1\.npy, got 20"
    ):
        find_vectors(clip_folder)
    np.save(tmp_path / "a.npy", vectors(3))
    for count, name, content in ((2, "ids.txt", "a\nb\n"), (4, "ids.txt", "a\nb\nc\n\n"), (1, "told.jsonl", "{}")):
        (tmp_path / name).write_text(content)
        option = {"ids" if name == "ids.txt" else "provenance": tmp_path / name}
        with pytest.raises(StoreError, match=rf"{name}: expected a row for each of the 3 vectors, got {count}"):
            find_vectors(tmp_path / "a.npy", **option)


def test_files_without_their_partner_are_refused(clip_folder: Path) -> None:
    (clip_folder / "metadata" / "metadata_1.parquet").rename(clip_folder / "metadata" / "metadata_2.parquet")
    with pytest.raises(StoreError, match=r"img_emb_1\.npy has no metadata of its number \(2 such files\)"):
        find_vectors(clip_folder)


def test_files_of_different_widths_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", vectors(2))
    np.save(tmp_path / "b.npy", vectors(2, DIM + 1))
    with pytest.raises(FingerprintError, match=r"b\.npy has vectors of 9 numbers, .*a\.npy of 8"):
        find_vectors(tmp_path)


def test_vectors_of_another_width_than_the_index_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", vectors(2, DIM + 1))
    with pytest.raises(FingerprintError, match="expected vectors of 8 numbers, as toy makes them, got 9"):
        imported(tmp_path)


def test_a_damaged_table_stops_the_import_and_keeps_what_came_before(
    clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "BATCH_ROWS", 10)
    monkeypatch.setattr(tables, "_READ_ROWS", 5)
    whole, path = (clip_folder / "metadata" / "metadata_1.parquet"), clip_folder / "metadata" / "metadata_1.parquet"
    content = bytearray(whole.read_bytes())
    content[4:400] = bytes(396)
    path.write_bytes(content)
    store = Store.create(None, MADE_BY)
    with pytest.raises(StoreError, match=r"metadata_1\.parquet is damaged"):
        import_vectors(store, find_vectors(clip_folder))
    assert (len(store), store.problems()) == (10, [])
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(StoreError, match=r"metadata_1\.parquet is damaged"):
        find_vectors(clip_folder)


@pytest.mark.parametrize("line", ["{", "[1]", '"text"', "", "[" * 100_000])
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    np.save(tmp_path / "a.npy", vectors(2))
    (tmp_path / "told.jsonl").write_text(f"{{}}\n{line}\n")
    with pytest.raises(StoreError, match=r"told\.jsonl, line 2: expected a JSON object"):
        imported(tmp_path / "a.npy", provenance=tmp_path / "told.jsonl")


def test_odd_fields_of_a_table_become_text(tmp_path: Path) -> None:
    from pyarrow import binary, parquet, table

    columns = {"url": [None, float("nan"), 2.5], "key": [[1], [2, 3], []], "image_path": ["a", "b", "c"]}
    parquet.write_table(table(columns).append_column("path", [[b"\xff", b"p", None]]), tmp_path / "told.parquet")
    assert binary() is not None
    found = list(tables.read_rows(tmp_path / "told.parquet"))
    assert [one.source for one in found] == ["a", "b", "2.5"]
    assert [one.key for one in found] == ["[1]", "[2, 3]", "[]"]


def test_nothing_to_import_is_wrong_use(tmp_path: Path, clip_folder: Path) -> None:
    for source, text in (
        (tmp_path / "missing", "does not exist"), (tmp_path / "*.npy", "does not exist"), ([], "got no path"),
        ([clip_folder, clip_folder], "one folder or any number"), (clip_folder / "metadata", "found none"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=text):
            find_vectors(source)
    for path in (clip_folder / "img_emb").iterdir():
        path.unlink()
    with pytest.raises(UsageError, match=r"found none \(text embeddings are no images\)"):
        find_vectors(clip_folder)
    np.save(tmp_path / "a.npy", vectors(1))
    with pytest.raises(UsageError, match=r"told\.csv: convert it"):
        find_vectors(tmp_path / "a.npy", provenance=tmp_path / "told.csv")
    with pytest.raises(UsageError, match=r"ids\.txt does not exist"):
        find_vectors(tmp_path / "a.npy", ids=tmp_path / "ids.txt")


def test_parquet_without_pyarrow_says_how_to_install_it(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"pip install knn-diffusion\[parquet\]"):
        find_vectors(clip_folder)
    with pytest.raises(MissingDependencyError, match=r"knn-diffusion\[parquet\], or export as npy"):
        export_vectors(filled(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_vectors(filled(), tmp_path / "out", layout="npy")
    assert len(imported(tmp_path / "out")[0]) == 30


@pytest.mark.parametrize("shape", [(0,), (0, DIM), (0, 0), (0, DIM + 1)])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_shards_without_a_vector_are_passed_over(tmp_path: Path, shape: tuple[int, ...], place: int) -> None:
    from pyarrow import parquet, table

    (tmp_path / "img_emb").mkdir()
    (tmp_path / "metadata").mkdir()
    rows = iter(vectors(4).reshape(2, 2, DIM))
    for number in range(3):
        made = np.zeros(shape, np.float32) if number == place else next(rows)
        np.save(tmp_path / "img_emb" / f"img_emb_{number}.npy", made)
        keys = [f"{number}-{n}" for n in range(len(made))]
        parquet.write_table(table({"key": keys}), tmp_path / "metadata" / f"metadata_{number}.parquet")
    store, report = imported(tmp_path)
    assert (report.added, report.num_skipped) == (4, 0)
    assert [one[2] for one in facts(store)] == [
        f"{number}-{n}" for number in range(3) if number != place for n in range(2)
    ]


def test_files_without_any_vector_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((0, DIM), np.float32))
    with pytest.raises(StoreError, match=r"expected vectors in .*a\.npy, found none in 1 files: save some"):
        find_vectors(tmp_path / "a.npy")


def test_the_folder_of_embeddings_itself_finds_its_metadata(clip_folder: Path) -> None:
    assert facts(imported(clip_folder / "img_emb")[0]) == facts(imported(clip_folder)[0])


def test_endings_in_capitals_are_endings(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", vectors(3))
    (tmp_path / "a.npy").rename(tmp_path / "A.NPY")
    assert find_vectors(tmp_path / "A.NPY").num_rows == find_vectors(tmp_path).num_rows == 3


@pytest.mark.parametrize(
    ("name", "cure"), [("knn.index", "index.reconstruct_n"), ("emb.parquet", "--provenance"), ("emb.pt", "numpy.save")]
)
def test_vectors_in_other_files_are_refused_with_what_to_do(tmp_path: Path, name: str, cure: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UsageError, match=rf"expected a folder or \.npy files of vectors, got .*: .*{re.escape(cure)}"):
        find_vectors(tmp_path / name)
