"""Whose embeddings they are: an index of vectors from files knows its encoder, or says what is missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from embedding_files import DIM, Encoder, facts, filled, vectors, write_clip_folder
from PIL import Image

from knn_diffusion.errors import FingerprintError, StoreError, UsageError
from knn_diffusion.image_index import ImageIndex
from knn_diffusion.retrieval.dedup import OFF
from knn_diffusion.retrieval.interchange import (
    export_vectors,
    find_vectors,
)
from knn_diffusion.retrieval.store import Store


@pytest.fixture
def clip_folder(tmp_path: Path) -> Path:
    return write_clip_folder(tmp_path / "clip")


# Whose embeddings they are


def test_an_imported_index_searches_by_text_and_keeps_its_encoder(clip_folder: Path, tmp_path: Path) -> None:
    with ImageIndex.import_embeddings(clip_folder, tmp_path / "index", Encoder()) as index:
        assert index.import_report is not None
        assert (len(index), index.import_report.added) == (30, 30)
        assert len(index.search_text("a cat", 3).ids[0]) == 3
        index.check()
    with pytest.raises(FingerprintError, match=r"was built with toy \(8-d, ffffffffffff\), the encoder is other"):
        ImageIndex.open(tmp_path / "index", Encoder("other", "0" * 64))


def test_an_encoder_known_by_name_only_searches_by_vectors(clip_folder: Path, tmp_path: Path) -> None:
    with ImageIndex.import_embeddings(clip_folder, tmp_path / "index", encoder_name="ViT-B/32", dim=DIM) as index:
        query = vectors(30)[4:5]
        assert index.search(query, 1).ids[0] == [index.ids[4]]
        for asked in (lambda: index.search_text("a cat", 1), lambda: index.search_image(Image.new("RGB", (8, 8)), 1)):
            with pytest.raises(
                FingerprintError, match=r"made by ViT-B/32 \(8-d\), which is not at hand.*--encoder FOLDER"
            ):
                asked()
        assert index.info()["encoder"] == "ViT-B/32"
    with pytest.raises(FingerprintError, match="not at hand"):
        ImageIndex.open(tmp_path / "index", Encoder("ViT-B/32"))


def test_naming_the_encoder_later_makes_texts_searchable(clip_folder: Path, tmp_path: Path) -> None:
    ImageIndex.import_embeddings(clip_folder, tmp_path / "index", encoder_name="ViT-B/32").close()
    with pytest.raises(
        FingerprintError, match="known by name only.*--encoder-name 'ViT-B/32' says that they are the same"
    ):
        ImageIndex.import_embeddings(clip_folder, tmp_path / "index", Encoder())
    with ImageIndex.import_embeddings(clip_folder, tmp_path / "index", Encoder(), encoder_name="ViT-B/32") as index:
        assert index.import_report is not None
        assert (index.import_report.added, index.import_report.already_present) == (0, 30)
        assert index.search_text("a cat", 1).ids[0]
    with ImageIndex.open(tmp_path / "index", Encoder()) as index:
        assert index.info()["fingerprint"] == "f" * 64


def test_vectors_of_two_encoders_never_mix(clip_folder: Path, tmp_path: Path) -> None:
    ImageIndex.import_embeddings(clip_folder, tmp_path / "index", Encoder()).close()
    others: list[dict[str, Any]] = [{"encoder": Encoder("toy", "0" * 64)}, {"encoder_name": "other"}]
    for other in others:
        with pytest.raises(
            FingerprintError, match=r"was made with toy \(8-d, ffffffffffff\), the vectors to import with"
        ):
            ImageIndex.import_embeddings(clip_folder, tmp_path / "index", **other)
    with ImageIndex.import_embeddings(clip_folder, tmp_path / "index", encoder_name="toy") as index:
        assert index.info()["fingerprint"] == "f" * 64


def test_an_export_names_its_encoder_itself(tmp_path: Path) -> None:
    export_vectors(filled(), tmp_path / "out")
    with ImageIndex.import_embeddings(tmp_path / "out", tmp_path / "index") as index:
        assert (index.info()["encoder"], index.info()["fingerprint"]) == ("toy", "f" * 64)
    with pytest.raises(FingerprintError, match="was made with toy"):
        ImageIndex.import_embeddings(tmp_path / "out", tmp_path / "other", Encoder("toy", "0" * 64))
    assert not (tmp_path / "other").exists()
    (tmp_path / "out" / "encoder.json").write_text('{"name": "toy"}')
    with pytest.raises(StoreError, match=r"expected the encoder of the vectors.*mend the file or take it away"):
        find_vectors(tmp_path / "out")


def test_the_encoder_must_be_said_and_fit(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected the encoder that made the vectors \(8-d\): give --encoder"):
        ImageIndex.import_embeddings(clip_folder, tmp_path / "index")
    wrong: list[dict[str, Any]] = [{"encoder": Encoder(dim=9)}, {"encoder_name": "toy", "dim": 9}]
    for said in wrong:
        with pytest.raises(FingerprintError, match="expected vectors of 9 numbers, as toy makes them, got 8"):
            ImageIndex.import_embeddings(clip_folder, tmp_path / "index", **said)
    assert not (tmp_path / "index").exists()


def test_an_index_of_nothing_usable_is_not_left_behind(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((3, DIM), np.float32))
    with pytest.raises(
        StoreError, match=r"none of 3 vectors in .*a\.npy could be used \(first: a\.npy::0: zero vector\)"
    ):
        ImageIndex.import_embeddings(tmp_path / "a.npy", tmp_path / "index", Encoder())
    assert not (tmp_path / "index").exists()


def test_an_import_into_a_sealed_index_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    with ImageIndex.import_embeddings(clip_folder, tmp_path / "index", Encoder()) as index:
        index.save(tmp_path / "sealed", sealed=True)
    with pytest.raises(StoreError, match="is read-only: import into a new folder"):
        ImageIndex.import_embeddings(clip_folder, tmp_path / "sealed", Encoder())


def test_vectors_without_pictures_lie_beside_images_with_them(clip_folder: Path, tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (8, 8), "red")]
    with ImageIndex.build(pictures, tmp_path / "index", Encoder()) as index:
        before = index.ids
    with ImageIndex.import_embeddings(clip_folder, tmp_path / "index", Encoder()) as index:
        assert (len(index), index.ids[:1]) == (31, before)
        assert index.search(vectors(30)[:1], 31, deduplicate=False).shortfall[0] == 0
        assert index.preview(index.ids[1]) is None
        index.export(tmp_path / "out", faiss=True)
    with ImageIndex.import_embeddings(tmp_path / "out", tmp_path / "again") as again:
        assert facts(again._store) == facts(index_store(tmp_path / "index"))
        assert again.rule != OFF


def index_store(folder: Path) -> Store:
    return Store.open(folder, read_only=True)


# The command line


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    from knn_diffusion.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_the_commands_import_search_and_export(run: Any, clip_folder: Path, tmp_path: Path) -> None:
    target, named = tmp_path / "index", ("--encoder-name", "ViT-B/32", "--dim", DIM)
    code, out, _ = run("index", "import", clip_folder, "--output", target, *named, "--json")
    told = json.loads(out)
    assert (code, told["added"], told["count"], told["index"]) == (0, 30, 30, str(target))
    code, _, err = run("index", "search", target, "--text", "a cat")
    assert (code, err.count("\n")) == (1, 1)
    assert "ViT-B/32" in err
    code, out, _ = run("index", "export", target, "--output", tmp_path / "out", "--format", "npy", "--faiss")
    assert (code, out) == (
        0, f"wrote 30 embeddings of 8 numbers and a faiss index (Flat) to {tmp_path / 'out'}\n",
    )  # fmt: skip
    code, out, _ = run("index", "import", tmp_path / "out", "--output", tmp_path / "again")
    assert (code, out.splitlines()[0]) == (0, "added 30, present before 0, skipped 0")
    assert run("index", "export", target, "--output", tmp_path / "out")[0] == 2
    assert run("index", "export", target, "--output", tmp_path / "new", "--format", "csv")[0] == 2
    assert run("index", "import", clip_folder, "--output", tmp_path / "new")[0] == 2


def test_the_command_lists_what_it_skipped(run: Any, tmp_path: Path) -> None:
    rows = vectors(14)
    rows[:12] = 0
    np.save(tmp_path / "a.npy", rows)
    code, out, err = run("index", "import", tmp_path / "a.npy", "--output", tmp_path / "i", "--encoder-name", "toy")
    assert (code, out.splitlines()[0]) == (0, "added 2, present before 0, skipped 12")
    assert err.splitlines() == [
        *(f"skipped a.npy::{n}: zero vector" for n in range(10)), "skipped 2 more: {'zero vector': 12}",
    ]  # fmt: skip
