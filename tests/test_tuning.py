"""Tuning measures recall against comparing everything, and keeps the least reach that is enough."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from knn_diffusion.errors import StoreError, UsageError
from knn_diffusion.image_index import ImageIndex
from knn_diffusion.image_index.tuning import read_texts, report, tune
from knn_diffusion.retrieval import tuning
from knn_diffusion.retrieval.index import LocalRetriever
from knn_diffusion.retrieval.plan import IndexConfig, Reach
from knn_diffusion.retrieval.store import EncoderIdentity, Item, Store

DIM = 24
CELLS = IndexConfig(exact_below=10, cells=32)


class NumberEncoder:
    """A text is the seed of a vector far from all images."""

    name, fingerprint, dim = "numbers", "ab" * 8, DIM

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        away = np.zeros(DIM)
        away[0] = 4
        rows = np.stack([away + np.random.default_rng(int(one)).standard_normal(DIM) for one in texts])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        raise AssertionError


def fill(store: Store, count: int) -> Store:
    random = np.random.default_rng(0)
    centres = random.standard_normal((40, DIM))
    vectors = centres[random.integers(0, 40, count)] + 0.8 * random.standard_normal((count, DIM))
    contents = [hashlib.sha256(str(n).encode()).hexdigest() for n in range(count)]
    store.append([Item(source=f"{n}.png", content=one, id=str(n)) for n, one in enumerate(contents)], vectors)
    return store


def made(folder: Path | None = None, count: int = 2000) -> ImageIndex:
    identity = EncoderIdentity(name="numbers", fingerprint="ab" * 8, dim=DIM)
    return ImageIndex(fill(Store.create(folder, identity), count), NumberEncoder(), CELLS)


TEXTS = [str(n) for n in range(100, 160)]


def test_exact_neighbors_are_those_of_the_whole_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "BLOCK_ROWS", 64)
    with made(count=300) as index:
        store = index.retriever.store
        store.remove(["5", "6"])
        queries = tuning.image_queries(store, 20, 4)
        stored = store.embeddings(np.arange(300)).astype(np.float64)
        stored /= np.linalg.norm(stored, axis=1, keepdims=True)
        for own, truth, cosines in zip(queries.own, queries.truth, queries.cosines, strict=True):
            scores = stored @ stored[own]
            scores[[own, 5, 6]] = -2
            assert truth.tolist() == np.argsort(-scores)[:4].tolist()
            np.testing.assert_allclose(cosines, np.sort(scores)[::-1][: len(cosines)], atol=1e-6)


def test_recall_is_one_when_everything_is_looked_at_and_less_when_not() -> None:
    with made() as index:
        queries = tuning.image_queries(index.retriever.store, 60, 5)
        assert tuning.measure(index.retriever, queries, Reach(probes=32, depth=400)).recall == 1
        blind = tuning.measure(index.retriever, queries, Reach(probes=1, depth=1))
        assert 0.1 < blind.recall < 0.95
        assert blind.milliseconds > 0


def test_the_least_reach_that_is_enough_is_kept_with_the_index(tmp_path: Path) -> None:
    with made(tmp_path / "index") as index:
        images, texts = tune(index, TEXTS, target=0.97, k=5, sample=80)
        assert (images.modality, texts.modality) == ("image", "text")
        assert images.met
        assert images.chosen.recall >= 0.97
        fewer = [one for one in images.tried if one.reach.probes < images.chosen.reach.probes]
        assert all(one.recall < 0.97 for one in fewer)
        assert index.retriever.settings == replace(CELLS, image=images.chosen.reach, text=texts.chosen.reach)
    with ImageIndex.open(tmp_path / "index", NumberEncoder()) as index:
        assert index.retriever.settings.image == images.chosen.reach
        assert index.retriever.settings.text == texts.chosen.reach


def test_without_texts_their_reach_stays() -> None:
    with made() as index:
        (images,) = tune(index, target=0.5, k=5, sample=40)
        assert index.retriever.settings == replace(CELLS, image=images.chosen.reach)


def test_what_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "PROBES", (1,))
    with made() as index:
        (images,) = tune(index, target=1.0, k=5, sample=40, save=False)
        assert not images.met
        assert images.chosen.recall == max(one.recall for one in images.tried)
        assert index.retriever.settings == CELLS


@pytest.mark.parametrize("target", [0.0, 1.01])
def test_a_recall_that_cannot_be_is_refused(target: float) -> None:
    with made() as index, pytest.raises(UsageError, match="expected a recall above 0 and at most 1"):
        tune(index, target=target)


def test_recall_is_not_measured_across_a_compaction() -> None:
    with made() as index:
        store = index.retriever.store
        queries = tuning.image_queries(store, 20, 5)
        store.remove([store.items(np.array([0]))[0].id])
        assert tuning.measure(index.retriever, queries, CELLS.image).recall > 0
        store.compact()
        with pytest.raises(StoreError, match="was compacted while recall was measured on it: measure again"):
            tuning.measure(index.retriever, queries, CELLS.image)


def test_an_index_that_compares_everything_needs_no_tuning() -> None:
    identity = EncoderIdentity(name="numbers", fingerprint="ab" * 8, dim=DIM)
    with (
        ImageIndex(fill(Store.create(None, identity), 30), NumberEncoder()) as index,
        pytest.raises(UsageError, match="one of 30 images compares them all and misses none: there is nothing to tune"),
    ):
        tune(index)


def test_a_read_only_index_keeps_its_reach(tmp_path: Path) -> None:
    made(tmp_path / "index").close()
    with (
        ImageIndex.open(tmp_path / "index", NumberEncoder(), read_only=True, settings=CELLS) as index,
        pytest.raises(StoreError, match="is read-only: save a copy of it"),
    ):
        tune(index, k=5, sample=20)


def test_a_report_has_both_modalities_their_gap_and_a_plot(tmp_path: Path) -> None:
    with made() as index:
        found = report(index, TEXTS, k=5, sample=80)
        assert found.gap is not None
        assert found.gap.text_text > found.gap.text_image
        assert found.gap.image_nearest > found.gap.text_nearest
        images, texts = found.curves["image"], found.curves["text"]
        assert [one.reach.probes for one in images] == [1, 4, 8, 20, 32]
        assert images[0].recall < images[-1].recall
        assert {one.reach.depth for one in texts} == {20}
        text = found.to_markdown()
        assert text.startswith("2,000 images, fast-scan, 32 cells\n\n| image queries: cells looked into | recall@5 |")
        assert "Gap: mean cosine" in text
        found.plot(tmp_path / "plot.png")
        with Image.open(tmp_path / "plot.png") as picture:
            assert picture.size == (900, 600)
        with pytest.raises(
            UsageError, match=r"expected a \.png, \.svg, \.pdf file for the plot, got plot\.xyz: change"
        ):
            found.plot(Path("plot.xyz"))
        for wrong in ({"k": 0}, {"sample": 0}):
            with pytest.raises(UsageError, match=f"expected {next(iter(wrong))} of at least 1, got 0"):
                report(index, **wrong)


def test_a_report_of_an_index_that_compares_everything_says_so() -> None:
    identity = EncoderIdentity(name="numbers", fingerprint="ab" * 8, dim=DIM)
    with ImageIndex(fill(Store.create(None, identity), 90), NumberEncoder()) as index:
        found = report(index, TEXTS, k=5, sample=20)
        assert [one.recall for points in found.curves.values() for one in points] == [1, 1]
        assert "Every image is compared." in found.to_markdown()


def test_mean_pairs_are_those_of_all_pairs() -> None:
    rows = NumberEncoder().encode_texts(TEXTS[:7])
    pairs = (rows @ rows.T)[np.triu_indices(7, 1)]
    queries = tuning.Queries(
        modality="text",
        vectors=rows,
        own=np.full(7, -1),
        truth=np.zeros((7, 1), np.int64),
        cosines=np.ones((7, 1)),
        generation=0,
    )
    assert tuning.modality_gap(queries, queries).text_text == pytest.approx(pairs.mean(), abs=1e-6)


def test_texts_are_read_one_a_line(tmp_path: Path) -> None:
    (tmp_path / "texts").write_text("a dog\n\n  a cat \n")
    assert read_texts(tmp_path / "texts") == ["a dog", "a cat"]
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(UsageError, match="is empty: write queries into it"):
        read_texts(tmp_path / "empty")
    with pytest.raises(UsageError, match="cannot be read"):
        read_texts(tmp_path / "missing")


def test_a_small_index_is_refused() -> None:
    with (
        Store.create(None, EncoderIdentity(name="n", fingerprint="f" * 16, dim=DIM)) as store,
        pytest.raises(UsageError, match="expected an index of more than 11 images to measure k=10 on, got 8: lower k"),
    ):
        tuning.image_queries(LocalRetriever(fill(store, 8)).store, 5, 10)
