"""Embedding on Ray gives the index of one process, whatever dies on the way."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_encoder import tiny_encoder

from knn_diffusion.errors import (
    ConfigError,
    FingerprintError,
    KnnDiffusionError,
    MissingDependencyError,
    StoreError,
    UsageError,
)
from knn_diffusion.image_index import ImageIndex, RayConfig, content_digest, distributed
from knn_diffusion.image_index.embedding import Group
from knn_diffusion.images import SourceImage, find_images
from knn_diffusion.models.encoders import save_encoder
from knn_diffusion.retrieval.store import EncoderIdentity, Item, Store

HERE = RayConfig(workers=2)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """One Ray for all tests here, started as the package does; its processes find the same code."""
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'knn-diffusion[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        with distributed.connected(HERE) as connected:
            yield connected


def picture(seed: int, size: int = 12) -> Image.Image:
    cells = np.random.default_rng(seed).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(cells).resize((size, size), Image.Resampling.NEAREST)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with files, a tar shard, a parquet table, copies among them, and four that cannot be read."""
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(30):
        picture(seed).save(folder / f"{seed:02}.png")
    picture(3).save(folder / "copy.bmp")
    (folder / "broken.png").write_bytes(b"no image")
    os.symlink(folder / "00.png", os.path.join(os.fsencode(folder), b"caf\xe9.png"))
    with tarfile.open(folder / "shard.tar", "w") as shard:
        for name, content in [*((f"{n}.png", encoded(picture(n))) for n in range(28, 40)), ("cut.png", b"\x89PNG")]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    (folder / "damaged.tar").write_bytes(b"no shard" * 100)
    rows = [encoded(picture(n)) for n in range(38, 50)] + [None]
    parquet.write_table(arrow.table({"image": rows}), folder / "table.parquet", row_group_size=5)
    return folder


def contents(index: ImageIndex) -> dict[str, Any]:
    """Everything an index holds, but for the time."""
    assert index.folder is not None
    with Store.open(index.folder) as store:
        now = store.snapshot()
        items = [facts[:4] for facts in store.facts(now.live_rows)]
        previews = [store.preview(int(row)) for row in now.live_rows]
    segments = {path.name: path.read_bytes() for path in (index.folder / "segments").iterdir()}
    return {"items": items, "previews": previews, "segments": segments, "rule": index.rule}


def test_an_index_made_on_ray_is_that_of_one_process(ray: Any, photos: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    plain = ImageIndex.build([photos], tmp_path / "plain", tiny_encoder())
    spread = ImageIndex.build(
        [photos], tmp_path / "spread", tiny_encoder(), ray=HERE, progress=lambda *one: told.append(one)
    )
    assert plain.report is not None
    assert (plain.report.added, plain.report.already_present, len(plain.report.skipped)) == (50, 6, 4)
    assert spread.report == plain.report
    assert contents(spread) == contents(plain)
    assert told == [("adding images", number, 60) for number in range(61)]
    spread.check()


class Deadly:
    """An encoder that kills its process: once at images of 13 pixels, always at those of 17."""

    name, dim, fingerprint = "deadly", 3, "dead" * 16

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        sizes = {image.width for image in images}
        if 17 in sizes or (13 in sizes and not self.marker.exists()):
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return np.stack([np.asarray(image, np.float32).mean((0, 1)) for image in images])

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        raise NotImplementedError


def test_a_killed_worker_costs_nothing_and_an_image_that_kills_them_all_is_listed(
    ray: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes = [13 if number == 11 else 17 if number == 21 else 12 for number in range(24)]
    images = [picture(number, size) for number, size in enumerate(sizes)]
    index = ImageIndex.build(images, tmp_path / "index", Deadly(tmp_path / "marker"), ray=HERE)
    assert (tmp_path / "marker").exists()
    together = images[21:24]  # a chunk: 24 images, two workers, four chunks each
    assert index.ids == [content_digest(image)[:16] for image in images if image not in together]
    assert index.report is not None
    assert [one.source for one in index.report.skipped] == [f"picture {number}" for number in (21, 22, 23)]
    assert {one.reason for one in index.report.skipped} == {distributed.DEADLY}
    assert index.add(images[22:]).added == 2
    index.check()
    assert capfd.readouterr() == ("", "")


class Refusing(Deadly):
    """An encoder that fails at images it has been told of."""

    def __init__(self, refused: set[str], reason: str = "embedded again") -> None:
        self.refused, self.reason = refused, reason

    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        if any(content_digest(image) in self.refused for image in images):
            raise ValueError(self.reason)
        return np.stack([np.asarray(image, np.float32).mean((0, 1)) for image in images])


def test_an_interrupted_build_goes_on_without_embedding_again(ray: Any, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    images = [picture(number) for number in range(24)]
    for number, image in enumerate(images):
        image.save(tmp_path / "photos" / f"{number:02}.png")
    known, others = ({content_digest(image) for image in some} for some in (images[:15], images[15:]))
    with pytest.raises(KnnDiffusionError, match=r"one failed \(broken\): .* give the same command again; .* is kept"):
        ImageIndex.build(tmp_path / "photos", tmp_path / "index", Refusing(others, "broken"), ray=HERE)
    index = ImageIndex.build(tmp_path / "photos", tmp_path / "index", Refusing(known), ray=HERE)
    assert index.report is not None
    assert (index.report.added, index.report.already_present) == (9, 15)
    assert index.ids == [content_digest(image)[:16] for image in images]
    index.check()
    with pytest.raises(UsageError, match="exists: choose another or add to the index there"):
        ImageIndex.build(tmp_path / "photos", tmp_path / "index", Refusing(set()), ray=HERE)


def test_a_build_that_another_encoder_began_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_encoder(tiny_encoder(), tmp_path / "encoder")
    with Store.create(tmp_path / "index", EncoderIdentity(name="other", fingerprint="00", dim=8)) as store:
        store.set_setting("building", "yes")
    opened, open_ = list[Store](), Store.open
    monkeypatch.setattr(Store, "open", lambda folder: opened.append(open_(folder)) or opened[-1])
    with pytest.raises(FingerprintError, match=r"was built with other \(8-d, 00\), the encoder is tiny"):
        ImageIndex.build([picture(0)], tmp_path / "index", tmp_path / "encoder", ray=HERE)
    with pytest.raises(StoreError, match="was closed here: open it again"):
        opened[0].setting("encoder_place")
    with open_(tmp_path / "index") as store:
        assert store.setting("encoder_place") is None


def test_an_index_without_a_rule_is_no_interrupted_build(tmp_path: Path) -> None:
    made_by = tiny_encoder()
    identity = EncoderIdentity(name=made_by.name, fingerprint=made_by.fingerprint, dim=made_by.dim)
    Store.create(tmp_path / "index", identity).close()
    with pytest.raises(UsageError, match="exists: choose another or add to the index there"):
        ImageIndex.build([picture(0)], tmp_path / "index", made_by, ray=HERE)


def store_of(sources: Sequence[str]) -> Store:
    store = Store.create(None, EncoderIdentity(name="none", fingerprint="00", dim=2))
    items = [Item(source=source, content=f"{number:064}") for number, source in enumerate(sources)]
    store.append(items, np.ones((len(items), 2), np.float32))
    return store


def test_only_files_that_surely_stayed_as_they_were_are_passed_over_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    picture(0).save(tmp_path / "a.png")
    odd.hardlink_to(tmp_path / "a.png")
    store = store_of([str(tmp_path / "a.png"), "a.png", str(odd)])

    def ask(path: Path | str) -> list[Any]:
        monkeypatch.setattr(distributed, "connected", lambda settings: pytest.fail("Ray was asked"))
        return list(distributed.embed_on_ray([Group(find_images([path]))], tiny_encoder(), store, True, HERE))

    with pytest.raises(pytest.fail.Exception):
        ask(tmp_path / "a.png")  # written a moment before it was saved
    monkeypatch.setattr(distributed, "SETTLED_SECONDS", -1.0)
    assert ask(tmp_path / "a.png") == ask(odd) == [None]
    with pytest.raises(pytest.fail.Exception):
        ask("a.png")  # whoever named it so may have meant another folder
    os.utime(tmp_path / "a.png", (time.time() + 9, time.time() + 9))
    with pytest.raises(pytest.fail.Exception):
        ask(tmp_path / "a.png")


def test_of_a_large_index_only_the_wanted_images_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    store, read, asked = store_of([f"{number}.png" for number in range(50)]), Store.facts, list[int]()
    monkeypatch.setattr(Store, "facts", lambda self, rows, now: asked.extend(rows.tolist()) or read(self, rows, now))
    found = [SourceImage(f"{number}.png", "", lambda: picture(0)) for number in (60, 7, 3)]
    assert {source: content for source, (content, _) in distributed._known(store, found).items()} == {
        "3.png": f"{3:064}", "7.png": f"{7:064}",
    }  # fmt: skip
    assert asked == [3, 7]


def test_the_command_line_prints_its_answer_alone_and_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'knn-diffusion[ray]'")
    (tmp_path / "photos").mkdir()
    (tmp_path / "home").mkdir()
    for number in range(6):
        picture(number).resize((48, 48)).save(tmp_path / "photos" / f"{number}.png")
    save_encoder(tiny_encoder(), tmp_path / "encoder")
    before = set(os.listdir("/tmp"))
    command = ["index", "build", "photos", "--output", "index", "--encoder", "encoder", "--ray", "--json"]
    ran = subprocess.run(
        [sys.executable, "-m", "knn_diffusion", *command],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    assert json.loads(ran.stdout)["added"] == 6
    assert list((tmp_path / "home").iterdir()) == []
    assert not [name for name in set(os.listdir("/tmp")) - before if name.startswith("ray-")]


TWICE = """
import os
from knn_diffusion.image_index import RayConfig, distributed

os.environ["RAY_DATA_LOG_LEVEL"] = "ERROR"
before = dict(os.environ)
for _ in range(2):
    with distributed.connected(RayConfig(workers=1)) as ray:
        assert ray.nodes()
    print({name: value for name, value in os.environ.items() if before.get(name) != value}, len(before) - len(os.environ))
"""


def test_ray_leaves_no_environment_variable_and_starts_again(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'knn-diffusion[ray]'")
    ran = subprocess.run(
        [sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
        env=os.environ | {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert (ran.stdout, ran.returncode) == ("{} 0\n{} 0\n", 0), ran.stderr


def test_without_ray_the_command_that_installs_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"not installed: pip install 'knn-diffusion\[ray\]'"):
        ImageIndex.build([picture(0)], tmp_path / "index", tiny_encoder(), ray=HERE)
    assert not (tmp_path / "index").exists()


def test_an_address_where_nobody_answers_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_imported", lambda: SimpleNamespace(is_initialized=lambda: False))
    with (
        pytest.raises(KnnDiffusionError, match="expected a Ray cluster at 127.0.0.1:9, nobody answers there"),
        distributed.connected(RayConfig(address="127.0.0.1:9")),
    ):
        pass


def test_a_cluster_that_cannot_be_joined_is_told_in_plain_words() -> None:
    def init(*_: object, **__: object) -> None:
        raise ValueError("no such address")

    ray = SimpleNamespace(init=init, _private=SimpleNamespace(worker=SimpleNamespace()))
    text = r"expected a Ray cluster at nonsense, none could be joined \(no such address\): give the host:port"
    with pytest.raises(KnnDiffusionError, match=text):
        distributed._start(ray, "nonsense", "")


def test_workers_that_take_a_gpu_put_encoder_and_tokenizer_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "_imported", lambda: SimpleNamespace(get=lambda reference: reference))
    moved: list[str] = []
    encoder, tokenize = (SimpleNamespace(to=lambda device: moved.append(str(device))) for _ in range(2))
    distributed.Worker(None, [(encoder, tokenize)], str(tmp_path / "elsewhere"), True, on_gpu=True)
    assert moved == ["cuda", "cuda"]
    distributed.Worker(None, [(encoder, None)], str(tmp_path / "elsewhere"), True, on_gpu=True)
    assert moved == ["cuda"] * 3
    there = SimpleNamespace(cluster_resources=lambda: {"CPU": 64.0, "GPU": 4.0})
    asked = (RayConfig(), RayConfig(gpus_per_worker=0.5), RayConfig(gpus_per_worker=1.0))
    assert [distributed._places(there, settings) for settings in asked] == [64, 8, 4]
    with pytest.raises(KnnDiffusionError, match="expected 8 of a GPU for each worker, Ray has 4 GPUs: ask for less"):
        distributed._places(there, RayConfig(gpus_per_worker=8.0))


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="workers must be at least 1 or None, got 0"):
        RayConfig(workers=0)
    with pytest.raises(ConfigError, match="gpus_per_worker must be at least 0"):
        RayConfig(gpus_per_worker=-1.0)
