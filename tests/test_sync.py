"""An index follows its folder, loses images by place or condition, and shows itself."""

from __future__ import annotations

import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
from test_image_index import ENCODER, id_of, picture

from knn_diffusion.errors import UsageError
from knn_diffusion.image_index import ImageIndex
from knn_diffusion.retrieval.dedup import OFF


def later(path: Path) -> None:
    """As if the file had been written after everything that was done so far."""
    now = path.stat().st_mtime + 100
    os.utime(path, (now, now))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "photos"
    (place / "more").mkdir(parents=True)
    for seed, name in enumerate(("a.png", "b.png", "more/c.png", "more/d.png")):
        picture(seed).save(place / name)
    return place


@pytest.fixture
def index(folder: Path, tmp_path: Path) -> Any:
    picture(9).save(tmp_path / "elsewhere.png")
    images = [folder, tmp_path / "elsewhere.png", picture(8)]
    with ImageIndex.build(images, tmp_path / "index", ENCODER, rule=OFF) as opened:
        yield opened


def state(index: ImageIndex) -> set[str]:
    return set(index.ids)


def test_an_index_follows_its_folder_and_leaves_all_other_images_alone(index: ImageIndex, folder: Path) -> None:
    before = state(index)
    picture(20).save(folder / "new.png")
    picture(21).save(folder / "b.png")
    later(folder / "b.png")
    (folder / "more" / "c.png").unlink()
    plan = index.sync(folder)
    names = {kind: [Path(one).name for one in found] for kind, found in plan.to_dict().items()}
    assert names == {"new": ["new.png"], "changed": ["b.png"], "gone": ["c.png"]}
    assert state(index) == before, "nothing is changed by looking"
    report = plan.apply()
    assert report.added == 2
    assert state(index) == before - {id_of(picture(1)), id_of(picture(2))} | {id_of(picture(20)), id_of(picture(21))}
    again = index.sync(folder).to_dict()
    assert again == {"new": [], "changed": [], "gone": []}


def test_a_file_that_was_only_touched_or_saved_anew_is_no_change(index: ImageIndex, folder: Path) -> None:
    picture(0).save(folder / "a.png", compress_level=0)
    for name in ("a.png", "b.png"):
        later(folder / name)
    assert index.sync(folder).to_dict() == {"new": [], "changed": [], "gone": []}


def test_a_moved_image_stays_though_its_old_place_is_gone(index: ImageIndex, folder: Path) -> None:
    (folder / "a.png").rename(folder / "z.png")
    plan = index.sync(folder)
    assert [len(one) for one in plan.to_dict().values()] == [1, 0, 1]
    plan.apply()
    assert id_of(picture(0)) in index


def test_what_cannot_be_read_now_keeps_its_state(index: ImageIndex, folder: Path) -> None:
    before = state(index)
    (folder / "a.png").write_bytes(b"half")
    later(folder / "a.png")
    plan = index.sync(folder)
    plan.apply()
    assert state(index) == before


def test_an_empty_folder_empties_no_index(index: ImageIndex, folder: Path) -> None:
    shutil.rmtree(folder)
    with pytest.raises(UsageError, match="does not exist"):
        index.sync(folder)
    folder.mkdir()
    with pytest.raises(UsageError, match="found none"):
        index.sync(folder)
    assert len(index) == 6


def test_a_damaged_shard_does_not_take_its_images_away(tmp_path: Path) -> None:
    place = tmp_path / "shards"
    place.mkdir()
    for number in range(2):
        picture(number).save(tmp_path / "one.png")
        with tarfile.open(place / f"{number}.tar", "w") as archive:
            archive.add(tmp_path / "one.png", "one.png")
    with ImageIndex.build([place], None, ENCODER, rule=OFF) as index:
        (place / "0.tar").write_bytes(b"\0" * 3 + b"nothing" * 100)
        assert index.sync(place).to_dict()["gone"] == []
        (place / "0.tar").unlink()
        assert [Path(one).name for one in index.sync(place).to_dict()["gone"]] == ["0.tar::one.png"]


def test_a_folder_is_found_by_any_of_its_paths(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ImageIndex.build(["photos"], None, ENCODER, rule=OFF) as index:
        for path in ("photos", "./photos/", folder):
            assert index.sync(path).to_dict() == {"new": [], "changed": [], "gone": []}
            assert len(index.ids_from(path)) == 4


def test_images_are_found_by_where_they_came_from(index: ImageIndex, folder: Path) -> None:
    assert set(index.ids_from(folder / "more")) == {id_of(picture(2)), id_of(picture(3))}
    assert index.ids_from(folder / "a.png") == [id_of(picture(0))]
    assert index.ids_from(f"{folder}/mor") == []
    assert index.ids_from("it's %_*") == []
    assert set(index.ids_where("source LIKE '%more%'")) == set(index.ids_from(folder / "more"))


def test_an_index_shows_itself(index: ImageIndex) -> None:
    assert repr(index) == f"<ImageIndex {index.folder}: 6 images, 48 numbers each by colours>"
    page = index._repr_html_()
    assert page.count("<img ") == 6
    assert "&lt;ImageIndex" in page
