"""What every home of an image index answers: the index on this machine, in memory and in a folder, and a Milvus collection.

Milvus is milvus-lite, once as it is and once dressed as a server; a real cluster is in no test.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from milvus_server import ServerConnection

from knn_diffusion.errors import FingerprintError, StoreError, UsageError
from knn_diffusion.retrieval.dedup import OFF, DedupConfig
from knn_diffusion.retrieval.index import LocalRetriever, Retriever
from knn_diffusion.retrieval.milvus import MilvusConfig, MilvusRetriever
from knn_diffusion.retrieval.store import EncoderIdentity, Item, Store

DIM = 16
TOY = EncoderIdentity(name="toy", fingerprint="f" * 16, dim=DIM)
COPIES = DedupConfig(cosine=0.9, manhattan=2.0)


@dataclass(frozen=True)
class Home:
    """A place for images: `add` and `remove` change what `retriever` searches."""

    retriever: Any
    add: Callable[..., Any]
    remove: Callable[[Sequence[str]], None]


@pytest.fixture(scope="module")
def lite(tmp_path_factory: pytest.TempPathFactory) -> str:
    for module in ("pymilvus", "milvus_lite"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install knn-diffusion[milvus]")
    return str(tmp_path_factory.mktemp("milvus") / "images.db")


_numbers = count()


@pytest.fixture(params=["memory", "folder", "milvus", "milvus server"])
def home(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    if request.param.startswith("milvus"):
        uri, name = request.getfixturevalue("lite"), f"contract_{next(_numbers)}"
        if request.param == "milvus server":
            monkeypatch.setattr("knn_diffusion.retrieval.milvus.retriever.Connection", ServerConnection)
        with MilvusRetriever.create(uri, name, TOY, rule=COPIES, settings=MilvusConfig(index="FLAT")) as retriever:
            yield Home(retriever, retriever.add, retriever.remove)
    else:
        with Store.create(tmp_path / "index" if request.param == "folder" else None, TOY) as store:
            yield Home(LocalRetriever(store, rule=COPIES), store.append, store.remove)


def items_of(numbers: range) -> list[Item]:
    kinds = ("Fruit", "fish")
    return [
        Item(
            id=f"image{n}", source=f"{kinds[n % 2]}/{n}.png", key=f"it's \"{n}\"",
            content=hashlib.sha256(str(n).encode()).hexdigest(),
        )
        for n in numbers
    ]  # fmt: skip


def vectors_of(count: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((12, DIM))
    return (centres[random.integers(0, 12, count)] + 0.7 * random.standard_normal((count, DIM))).astype(np.float32)


def fill(home: Home, total: int = 200) -> np.ndarray:
    """Two batches of images; their stored vectors."""
    vectors = vectors_of(total)
    half = total // 2
    assert home.add(items_of(range(half)), vectors[:half]).all()
    assert home.add(items_of(range(half, total)), vectors[half:]).all()
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


def by_hand(stored: np.ndarray, query: np.ndarray, k: int, allowed: np.ndarray, threshold: float | None) -> list[int]:
    """Which images search must find, best first, written as plainly as possible."""
    units = stored.astype(np.float64) / np.linalg.norm(stored.astype(np.float64), axis=1, keepdims=True)
    kept: list[int] = []
    for place in np.argsort(-(units @ query), kind="stable"):
        copy = threshold is not None and any(units[place] @ units[other] > threshold for other in kept)
        if allowed[place] and not copy and len(kept) < k:
            kept.append(int(place))
    return kept


@pytest.mark.parametrize("rule", [OFF, COPIES], ids=["all", "without copies"])
def test_search_equals_comparing_everything(home: Home, rule: DedupConfig) -> None:
    stored, queries = fill(home), vectors_of(4, seed=1)
    assert isinstance(home.retriever, Retriever)
    gone: list[set[str]] = [{"image3", "unknown"}, set(), {f"image{n}" for n in range(0, 200, 2)}, {"image0"}]
    found = home.retriever.search(queries, 7, gone, rule=rule)
    assert found.shortfall.tolist() == [0] * 4
    assert found.embeddings.dtype == found.scores.dtype == np.float32
    for number, query in enumerate(queries.astype(np.float64)):
        allowed = np.array([f"image{n}" not in gone[number] for n in range(200)])
        expected = by_hand(stored, query, 7, allowed, rule.cosine)
        assert found.ids[number] == [f"image{n}" for n in expected]
        wide = stored[expected].astype(np.float64)
        scores = wide @ query / np.linalg.norm(query) / np.linalg.norm(wide, axis=1)
        np.testing.assert_allclose(found.scores[number], scores, atol=1e-7)
        np.testing.assert_array_equal(found.embeddings[number], stored[expected].astype(np.float32))


def test_an_image_query_may_leave_out_its_copies(home: Home) -> None:
    stored = fill(home)
    query = stored[5:6].astype(np.float32)
    assert home.retriever.search(query, 3).ids[0][0] == "image5"
    assert home.retriever.search(query, 3, drop_copies_of_query=True).scores.max() <= 0.9


def test_texts_may_be_asked_for_as_such(home: Home) -> None:
    fill(home)
    query = vectors_of(1, seed=3)
    assert home.retriever.search(query, 3, modality="text").ids == home.retriever.search(query, 3).ids


@pytest.mark.parametrize(
    ("where", "keeps"),
    [
        ("source LIKE '%fruit%'", lambda n: n % 2 == 0),
        ("source LIKE 'FISH/7_.png'", lambda n: n % 2 == 1 and 70 <= n < 80),
        ("key = 'it''s \"8\"'", lambda n: n == 8),
        ("id IN ('image1', 'image2', 'none') OR NOT source LIKE 'f%'", lambda n: n in (1, 2)),
        ("added_at > 1e9 AND (id = 'image4' OR id >= 'image98')", lambda n: n in (4, 98, 99)),
        ("added_at < 1e9", lambda n: False),
        ("id not in ('image1') and id between 'image0' and 'image11'", lambda n: n in (0, 10, 11, *range(100, 110))),
    ],
)  # fmt: skip
def test_a_condition_holds_before_the_cut_to_k(home: Home, where: str, keeps: Callable[[int], bool]) -> None:
    stored, query = fill(home), vectors_of(1, seed=4)
    kept = np.array([keeps(n) for n in range(200)])
    found = home.retriever.search(query, 15, where=where, rule=OFF)
    expected = [f"image{n}" for n in by_hand(stored, query[0].astype(np.float64), 15, kept, None)]
    assert found.ids[0] == expected + [""] * (15 - len(expected))
    assert found.shortfall.tolist() == [15 - len(expected)]


@pytest.mark.parametrize("where", ["", "colour = 'red'", "source LIKE", "id = 'a' id = 'b'", "1); DROP TABLE items"])
def test_a_condition_with_a_typo_is_refused(home: Home, where: str) -> None:
    fill(home, 4)
    with pytest.raises(UsageError, match=r"expected a condition .*source LIKE '%fruit%'.* mend it"):
        home.retriever.search(vectors_of(1), 1, where=where)


def test_a_shortfall_is_said_and_its_places_are_empty(home: Home) -> None:
    home.add(items_of(range(8)), np.repeat(vectors_of(2), 4, axis=0))
    found = home.retriever.search(vectors_of(1, seed=1), 5)
    assert found.shortfall.tolist() == [3]
    assert sorted(found.ids[0]) == ["", "", "", "image0", "image4"]
    assert not found.embeddings[0, 2:].any()
    assert not found.scores[0, 2:].any()


def test_over_fetching_gets_past_any_number_of_copies(home: Home) -> None:
    near, far = np.eye(DIM, dtype=np.float32)[:2]
    vectors = np.concatenate([np.repeat(near[None], 150, 0), (0.2 * near + far)[None]])
    home.add(items_of(range(151)), vectors)
    assert home.retriever.search(near[None], 2).ids == [["image0", "image150"]]


def test_excluding_most_of_them_still_gives_k(home: Home) -> None:
    fill(home)
    left = {"image17", "image71", "image150"}
    gone = [{f"image{n}" for n in range(200)} - left]
    assert set(home.retriever.search(vectors_of(1), 3, gone, rule=OFF).ids[0]) == left


def test_pictures_that_look_alike_are_copies_whatever_their_cosine(home: Home) -> None:
    vectors = np.eye(DIM, dtype=np.float32)
    home.add(items_of(range(2)), vectors[:2], np.full((2, 192), 50, np.uint8))
    home.add(items_of(range(2, 4)), vectors[2:4], np.full((2, 192), 90, np.uint8))
    home.add(items_of(range(4, 6)), vectors[4:6])
    query = np.array([[6, 5, 4, 3, 2, 1, *[0] * 10]], float)
    assert home.retriever.search(query, 4).ids == [["image0", "image2", "image4", "image5"]]


def test_additions_and_removals_count_in_the_next_search(home: Home) -> None:
    fill(home)
    query = vectors_of(1, seed=9)
    best = home.retriever.search(query, 1).ids[0][0]
    home.remove([best])
    assert best not in home.retriever.search(query, 199, rule=OFF).ids[0]
    home.add(items_of(range(900, 901)), query)
    assert home.retriever.search(query, 1).ids == [["image900"]]
    home.remove(["image900"])
    assert "image900" not in home.retriever.search(query, 199, rule=OFF).ids[0]


def test_an_unknown_id_is_refused_before_anything_is_removed(home: Home) -> None:
    fill(home, 4)
    with pytest.raises(UsageError, match=r"got 'no\\'pe' .*1 of 2 unknown.*nothing was removed|got \"no'pe\" .*1 of 2"):
        home.remove(["image1", "no'pe"])
    assert "image1" in home.retriever.search(vectors_of(1), 4, rule=OFF).ids[0]


def test_an_image_added_twice_is_there_once(home: Home) -> None:
    unnamed = [Item(source="a.png", content="ab" * 32), Item(source="b.png", content="cd" * 32)]
    vectors = np.eye(DIM, dtype=np.float32)
    assert home.add(unnamed[:1], vectors[:1]).tolist() == [True]
    assert home.add([*unnamed, unnamed[1]], vectors[:3]).tolist() == [False, True, False]
    found = home.retriever.search(vectors[:1], 2, rule=OFF)
    assert found.ids == [["ab" * 8, "cd" * 8]]


def test_ids_that_begin_alike_are_told_apart_by_their_content(home: Home) -> None:
    alike = [Item(source="a.png", content="ab" * 32), Item(source="b.png", content="ab" * 31 + "cd")]
    assert home.add(alike, np.eye(DIM, dtype=np.float32)[:2]).all()
    assert home.retriever.search(np.eye(DIM)[1:2], 1).ids == [[alike[1].content]]


def test_an_id_taken_by_other_content_is_refused(home: Home) -> None:
    fill(home, 4)
    other = Item(id="image1", source="x.png", content="ab" * 32)
    with pytest.raises(UsageError, match="id 'image1' is taken by other content.*: choose another id or remove"):
        home.add([other], vectors_of(1))


@pytest.mark.parametrize("k", [0, -1, 201, 20_000_000])
def test_an_impossible_k_is_refused(home: Home, k: int) -> None:
    fill(home)
    with pytest.raises(UsageError, match=f"k must be between 1 and 200, the number of images in .*, got {k}: change k"):
        home.retriever.search(vectors_of(1), k)


def test_every_image_can_be_asked_for(home: Home) -> None:
    fill(home)
    found = home.retriever.search(vectors_of(1), 200, rule=OFF)
    assert set(found.ids[0]) == {f"image{n}" for n in range(200)}


def test_an_empty_home_says_so(home: Home) -> None:
    with pytest.raises(StoreError, match="holds no images: add some before searching"):
        home.retriever.search(np.ones((1, DIM)), 1)


def test_bad_queries_are_refused(home: Home) -> None:
    fill(home, 4)
    with pytest.raises(
        FingerprintError, match="queries: expected vectors of 16 numbers, got 3: use the index's encoder"
    ):
        home.retriever.search(np.ones((1, 3)), 1)
    for bad, word in ((0.0, "zero"), (np.nan, "not finite"), (np.inf, "not finite")):
        with pytest.raises(UsageError, match=f"queries: expected finite vectors other than zero, row 1 is {word}"):
            home.retriever.search(np.stack([np.ones(DIM), np.full(DIM, bad)]), 1)
    with pytest.raises(UsageError, match="exclude_ids needs one list for each of the 2 queries, got 1: add the rest"):
        home.retriever.search(np.ones((2, DIM)), 1, exclude_ids=[["a"]])


def test_bad_vectors_are_refused_and_nothing_is_added(home: Home) -> None:
    fill(home, 4)
    with pytest.raises(FingerprintError, match="embeddings: expected vectors of 16 numbers, got 8"):
        home.add(items_of(range(4, 5)), np.ones((1, 8)))
    with pytest.raises(UsageError, match="embeddings: expected finite vectors other than zero, row 1 is zero"):
        home.add(items_of(range(4, 6)), np.stack([np.ones(DIM), np.zeros(DIM)]))
    with pytest.raises(UsageError, match="between 1 and 4"):
        home.retriever.search(np.ones((1, DIM)), 5)


def test_a_query_finds_the_same_alone_as_in_company(home: Home) -> None:
    fill(home)
    queries = vectors_of(20, seed=2)
    together = home.retriever.search(queries, 5)
    for number, query in enumerate(queries):
        alone = home.retriever.search(query[None], 5)
        assert alone.ids[0] == together.ids[number]
        np.testing.assert_array_equal(alone.scores[0], together.scores[number])


def test_no_queries_have_no_neighbors(home: Home) -> None:
    fill(home, 4)
    found = home.retriever.search(np.zeros((0, DIM), np.float32), 2)
    assert (found.ids, found.scores.shape, found.embeddings.shape) == ([], (0, 2), (0, 2, DIM))


def test_searches_from_many_threads_agree(home: Home) -> None:
    fill(home)
    queries = vectors_of(8, seed=5)
    expected = home.retriever.search(queries, 5).ids
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda query: home.retriever.search(query[None], 5).ids[0], queries))
    assert found == expected
