"""Arrays of the store: verified block by block, and never told when they are damaged."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from knn_diffusion.errors import StoreError
from knn_diffusion.retrieval import stored_array
from knn_diffusion.retrieval.store import EncoderIdentity, Item, Store
from knn_diffusion.retrieval.stored_array import BLOCK_ROWS, WORTH_BLOCKS, StoredArray

ROWS, WIDTH = WORTH_BLOCKS + 100, 8


def rows(count: int = ROWS) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, WIDTH)).astype(np.float16)


def written(folder: Path, blocks: bytes | None = None, count: int = ROWS) -> StoredArray:
    """An array on the disk, as somebody sees it who has only the store's facts of it."""
    made = StoredArray.of(rows(count))
    made.write(folder / "a.npy")
    known = made.blocks if blocks is None else blocks
    return StoredArray(sha256=made.sha256, shape=made.shape, dtype=made.dtype, blocks=known, path=made.path)


def flip(array: StoredArray, row: int) -> None:
    """Damage one bit of a row in the file."""
    assert array.path is not None
    content = bytearray(array.path.read_bytes())
    content[len(content) - (array.shape[0] - row) * 2 * WIDTH] ^= 1
    array.path.write_bytes(content)


def test_rows_come_back_one_by_one_and_together(tmp_path: Path) -> None:
    array, truth = written(tmp_path), rows()
    numbers = np.array([ROWS - 1, 0, 700, 700])
    assert np.array_equal(array.take(numbers), truth[numbers])
    assert all(np.array_equal(array.row(number), truth[number]) for number in (3, BLOCK_ROWS, ROWS - 1))
    assert np.array_equal(np.load(tmp_path / "a.npy"), truth)


def test_only_blocks_that_are_read_are_verified(tmp_path: Path) -> None:
    array = written(tmp_path)
    flip(array, 1000)
    sound = np.setdiff1d(np.arange(ROWS), np.arange(1000 - BLOCK_ROWS, 1000 + BLOCK_ROWS))
    assert np.array_equal(array.take(sound), rows()[sound])
    assert np.array_equal(array.row(5), rows()[5])
    for _ in range(2):
        with pytest.raises(StoreError, match=r"a\.npy is damaged"):
            array.row(1000)
    with pytest.raises(StoreError, match=r"a\.npy is damaged"):
        array.take(np.arange(ROWS))


@pytest.mark.parametrize("blocks", [b"", bytes(32), bytes(32 * (ROWS // BLOCK_ROWS + 1))], ids=["none", "few", "wrong"])
def test_where_digests_of_blocks_do_not_help_the_whole_file_decides(tmp_path: Path, blocks: bytes) -> None:
    array = written(tmp_path, blocks)
    assert np.array_equal(array.row(5), rows()[5])
    array = written(tmp_path, blocks)
    flip(array, 1000)
    with pytest.raises(StoreError, match="digest is not the stored one"):
        array.row(5)


def test_a_block_is_verified_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    array, verified, sha256 = written(tmp_path), list[int](), hashlib.sha256

    def counted(data: memoryview) -> object:
        verified.append(data.nbytes)
        return sha256(data)

    monkeypatch.setattr(stored_array.hashlib, "sha256", counted)
    for _ in range(3):
        array.row(BLOCK_ROWS)
        array.take(np.arange(BLOCK_ROWS, 2 * BLOCK_ROWS))
    assert verified == [BLOCK_ROWS * WIDTH * 2]


@pytest.mark.parametrize("harm", ["missing", "empty", "cut", "longer", "head"])
def test_a_file_that_is_not_what_was_written_is_refused(tmp_path: Path, harm: str) -> None:
    array = written(tmp_path)
    path = tmp_path / "a.npy"
    content = path.read_bytes()
    changed = {"empty": b"", "cut": content[:-1], "longer": content + b"\0", "head": content.replace(b"(", b"[", 1)}
    path.unlink() if harm == "missing" else path.write_bytes(changed[harm])
    with pytest.raises(StoreError, match=r"a\.npy .*: restore a copy or build the index again"):
        array.row(0)
    assert list(array.problems())


def test_small_arrays_need_no_blocks(tmp_path: Path) -> None:
    array = written(tmp_path, count=WORTH_BLOCKS)
    assert not array.blocks
    assert np.array_equal(array.row(9), rows(WORTH_BLOCKS)[9])


def test_a_store_reads_around_damage_and_forgets_the_digests_of_what_a_compaction_replaced(tmp_path: Path) -> None:
    vectors = rows() / np.linalg.norm(rows().astype(np.float32), axis=1, keepdims=True)
    items = [Item(source=str(n), content=hashlib.sha256(str(n).encode()).hexdigest(), id=str(n)) for n in range(ROWS)]
    with Store.create(tmp_path / "index", EncoderIdentity(name="toy", fingerprint="f" * 16, dim=WIDTH)) as store:
        store.append(items, vectors.astype(np.float16))
        store.remove(["7"])
    with Store.open(tmp_path / "index") as store:
        array = store.snapshot().segments[0].embeddings
        assert len(array.blocks) == 32 * -(-ROWS // BLOCK_ROWS)
        whole = array.path.read_bytes() if array.path else b""
        flip(array, 1000)
        assert np.allclose(store.embeddings(np.array([0, ROWS - 1])), vectors[[0, -1]], atol=1e-3)
        for ask in (lambda: store.embeddings(np.array([0, 1001])), store.compact):
            with pytest.raises(StoreError, match="embeddings.npy is damaged"):
                ask()
        assert any("embeddings.npy is damaged" in problem for problem in store.problems())
    (tmp_path / "index" / "segments" / "00000001.embeddings.npy").write_bytes(whole)
    with Store.open(tmp_path / "index") as store:
        store.compact()
        assert store.problems() == []
        assert store.live.query("SELECT number FROM blocks") == [(2,)]
