"""Models and encoders by `owner/name`: fetched once and verified, sent whole, and every failure a line with its cure."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants as hub_constants
from safetensors.torch import load_file
from test_convert_legacy import Call
from test_encoders import TEXTS, published, some_images
from test_published_encoders import cut
from tiny_hub import TinyHub, point_at, serving
from tiny_world import build_model, draw_pictures, same_pixels

from knn_diffusion import ImageIndex, KnnDiffusion
from knn_diffusion.cli import main
from knn_diffusion.errors import (
    CheckpointError,
    FingerprintError,
    HubError,
    KnnDiffusionError,
    MissingDependencyError,
    StoreError,
    UsageError,
)
from knn_diffusion.hub import fetch, is_hub_id
from knn_diffusion.model_folder import resolve_model
from knn_diffusion.models.encoders import JointEncoder, load_encoder

NAME = "someone/tiny"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    return build_model(place / "tiny", draw_pictures(place / "pictures"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TinyHub]:
    monkeypatch.chdir(tmp_path)
    with serving(tmp_path, monkeypatch) as running:
        yield running


@pytest.fixture
def shared(hub: TinyHub, model: Path) -> TinyHub:
    """A hub with the model, and beside it what a stranger may have put there."""
    there = Path(shutil.copytree(model, hub.folder(NAME)))
    for stray in ("setup.py", "pytorch_model.bin", "encoder/modeling.py", "index/cache.pkl", "denoiser/weights.ckpt"):
        (there / stray).write_bytes(b"anything")
    return hub


def test_a_model_is_downloaded_once_and_draws_as_in_its_folder(
    shared: TinyHub, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    there = KnnDiffusion.from_pretrained(NAME, device="cpu")
    assert [record.getMessage() for record in caplog.records if record.name == "knn_diffusion.hub"] == [
        f"downloading {NAME} from {hub_constants.ENDPOINT}"
    ]
    here = KnnDiffusion.from_pretrained(model, device="cpu")
    assert same_pixels(there("a red heart").images[0], here("a red heart").images[0])
    assert len(there.index) == 12
    caplog.clear()
    shared.asked.clear()
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    again = KnnDiffusion.from_pretrained(NAME, device="cpu")
    assert same_pixels(there("a cat").images[0], again("a cat").images[0])
    assert (caplog.records, shared.asked) == ([], [])


def test_only_the_files_of_a_model_are_downloaded(shared: TinyHub, model: Path) -> None:
    KnnDiffusion.from_pretrained(NAME, device="cpu")
    assert shared.fetched() == {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}


def test_what_is_added_to_a_downloaded_index_stays_in_memory(shared: TinyHub, tmp_path: Path) -> None:
    pipe = KnnDiffusion.from_pretrained(NAME, device="cpu")
    before = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    pipe.index.add(some_images(2))
    assert len(pipe.index) == 14
    pipe.index.close()
    assert {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()} == before
    assert len(KnnDiffusion.from_pretrained(NAME, device="cpu").index) == 12


def test_a_damaged_download_is_noticed(shared: TinyHub) -> None:
    path = shared.folder(NAME) / "denoiser" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        KnnDiffusion.from_pretrained(NAME, device="cpu")


def test_an_interrupted_download_goes_on(shared: TinyHub, tmp_path: Path) -> None:
    KnnDiffusion.from_pretrained(NAME, device="cpu")
    (gone,) = (tmp_path / "cache").rglob("snapshots/*/tokenizer/model.safetensors")
    gone.resolve().unlink()
    gone.unlink()
    shared.asked.clear()
    KnnDiffusion.from_pretrained(NAME, device="cpu")
    assert shared.fetched() == {"tokenizer/model.safetensors"}


def test_a_revision_can_be_given_but_only_on_the_hub(shared: TinyHub, model: Path) -> None:
    KnnDiffusion.from_pretrained(NAME, revision="v1", device="cpu")
    with pytest.raises(HubError, match=f"expected the revision v9 of {NAME}, there is none: see http"):
        KnnDiffusion.from_pretrained(NAME, revision="v9", device="cpu")
    with pytest.raises(UsageError, match="expected no revision"):
        KnnDiffusion.from_pretrained(model, revision="v1", device="cpu")


def test_a_path_is_never_looked_for_on_the_hub(hub: TinyHub, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    for name in ("runs/model", "bare", "a/b/c", "./a/b", "/a/b", "../a", "a/", "~/a", "C:\\a/b"):
        assert not is_hub_id(name)
        with pytest.raises(CheckpointError, match="expected a model folder"):
            KnnDiffusion.from_pretrained(name, device="cpu")
    assert not is_hub_id(Path("someone/tiny"))
    assert hub.asked == []


@pytest.mark.parametrize("name", ["my-run/model", "runs/index", "me/encoder", "a/tokenizer", "a/denoiser"])
def test_names_of_our_own_folders_are_paths_wherever_they_are_asked_for(
    hub: TinyHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id(name)
    with pytest.raises(CheckpointError, match="expected a model folder"):
        resolve_model(name)


def test_a_run_means_the_model_in_it(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, tmp_path / "my-run" / "model")
    assert resolve_model("my-run") == Path("my-run/model")


def test_a_pushed_model_comes_back_the_same(hub: TinyHub, model: Path, tmp_path: Path) -> None:
    pipe = KnnDiffusion.from_pretrained(model, device="cpu")
    pipe.index = ImageIndex.build(some_images(5), None, pipe.model.encoder)
    assert pipe.push_to_hub("me/mine", private=True) == "https://hub.test/me/mine/commit/main"
    assert hub.private == {"me/mine": True}
    with ImageIndex.open(hub.folder("me/mine") / "index") as sealed:
        assert sealed.info()["read_only"]
    stale = hub.folder("me/mine") / "index" / "segments" / "00000009.embeddings.npy"
    stale.write_bytes(b"")
    (hub.folder("me/mine") / "notes.txt").write_text("mine")
    back = KnnDiffusion.from_pretrained("me/mine", device="cpu")
    assert same_pixels(back("a blue hat", seed=4).images[0], pipe("a blue hat", seed=4).images[0])
    assert (len(back.index), back.index.info()["read_only"]) == (5, True)
    back.index = ImageIndex.build(some_images(3), None, pipe.model.encoder)
    back.push_to_hub("me/mine")
    assert not stale.exists()
    shutil.rmtree(tmp_path / "cache")
    assert len(KnnDiffusion.from_pretrained("me/mine", device="cpu").index) == 3
    assert (hub.folder("me/mine") / "notes.txt").read_text() == "mine"


def test_the_card_has_the_head_that_the_hub_reads(hub: TinyHub, model: Path) -> None:
    KnnDiffusion.from_pretrained(model, device="cpu").push_to_hub("me/mine")
    card = huggingface_hub.ModelCard.load(hub.folder("me/mine") / "README.md")
    head = card.data.to_dict()
    assert (head["license"], head["library_name"], head["pipeline_tag"]) == ("mit", "knn-diffusion", "text-to-image")
    assert "knn-diffusion" in head["tags"]


def test_the_command_line_draws_and_pushes(
    shared: TinyHub, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = ["generate", "a cat", "--model", NAME, "--revision", "v1", "--output", str(tmp_path / "drawn"), "--json"]
    assert main(drawn) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "tiny"
    assert main(["push", str(model), "me/mine", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["url"] == "https://hub.test/me/mine/commit/main"
    assert (shared.folder("me/mine") / "index" / "store.sqlite").is_file()
    for name in ("mine", "me/mine/more", "-me/mine"):
        assert main(["push", "--", str(model), name]) == 2
        assert "expected owner/name of a repository" in capsys.readouterr().err


# Indexes


@pytest.fixture
def photos(hub: TinyHub, model: Path) -> TinyHub:
    """A hub with an index beside its encoder, another that lies open in its repository, and what strangers put beside."""
    for part in ("index", "encoder"):
        shutil.copytree(model / part, hub.folder("me/photos") / part)
    shutil.copytree(model / "index", hub.folder("me/plain"))
    for stray in ("me/photos/index/cache.pkl", "me/plain/search.py", "me/plain/cells/part.bin"):
        (hub.place / stray).parent.mkdir(exist_ok=True)
        (hub.place / stray).write_bytes(b"anything")
    return hub


@pytest.mark.parametrize("name", ["me/photos", "me/plain"])
def test_a_model_draws_from_an_index_of_the_hub(
    photos: TinyHub, model: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = KnnDiffusion.from_pretrained(model, index=name, device="cpu")
    assert same_pixels(there("a cat").images[0], KnnDiffusion.from_pretrained(model, device="cpu")("a cat").images[0])
    assert there.index.read_only
    assert {Path(file).name for file in photos.fetched()} == {
        path.name for path in (model / "index").rglob("*") if path.is_file()
    }
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    photos.asked.clear()
    with ImageIndex.open(name, there.model.encoder) as again:
        assert (len(again), photos.asked) == (12, [])


def test_the_encoder_beside_an_index_is_fetched_when_it_is_needed(
    photos: TinyHub, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["index", "info", "me/photos", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["read_only"]
    assert not any(name.startswith("encoder/") for name in photos.fetched())
    (photos.folder("me/photos") / "notes.txt").write_text("a newer state")
    assert main(["index", "search", "me/photos", "--text", "a red heart", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["neighbors"]
    assert any(name.startswith("encoder/") for name in photos.fetched())
    with ImageIndex.open(model / "index") as here:
        assert [one["id"] for one in found] == here.search_text("a red heart", 10).ids[0]
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with ImageIndex.open("me/photos").overlay() as over:
        assert over.search_text("a red heart", 10).ids[0] == [one["id"] for one in found]


def test_an_index_of_the_hub_is_not_changed(photos: TinyHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", "add", "me/photos", "pictures"]) == 1
    assert "got me/photos, which is no folder here and on the hub not to be changed" in capsys.readouterr().err
    assert photos.asked == []
    index = ImageIndex.open("me/plain", tiny_encoder_of("me/photos", photos))
    index.add(some_images(2))
    assert (len(index), len(ImageIndex.open("me/plain"))) == (14, 12)
    with pytest.raises(StoreError, match="read-only"):
        index.compact()


def tiny_encoder_of(repository: str, hub: TinyHub) -> JointEncoder:
    return load_encoder(hub.folder(repository) / "encoder")


def test_a_repository_without_an_index_and_one_of_another_encoder_are_lines(
    photos: TinyHub, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos.folder("me/photos") / "index" / "store.sqlite").unlink()
    assert main(["index", "search", "me/photos", "--text", "a cat"]) == 1
    assert (
        "expected index/store.sqlite or store.sqlite in me/photos, the repository has none" in capsys.readouterr().err
    )
    assert main(["index", "info", "no/such"]) == 1
    assert "there is none that you may see, and no such folder here" in capsys.readouterr().err
    other = build_model(tmp_path / "other", seed=9)
    with pytest.raises(FingerprintError, match=r"was built with tiny .*, the encoder is tiny"):
        KnnDiffusion.from_pretrained(other, index="me/plain", device="cpu")


def test_an_index_that_is_pushed_as_a_model_is_told_how(
    photos: TinyHub, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(model / "index"), "me/mine"]) == 2
    assert (
        f"is an index: send it along with one (--index), or alone with `hf upload me/mine {model}"
        in capsys.readouterr().err
    )


def test_a_path_is_never_taken_for_an_index_of_the_hub(photos: TinyHub, tmp_path: Path) -> None:
    (tmp_path / "me").mkdir()
    for name in ("me/photos", "photos", "./you/photos", Path("you/photos")):
        with pytest.raises(StoreError, match="expected an image index in"):
            ImageIndex.open(name)
    assert photos.asked == []


def test_a_damaged_index_of_the_hub_is_noticed(photos: TinyHub, model: Path) -> None:
    (path,) = photos.folder("me/plain").glob("segments/*.embeddings.npy")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        KnnDiffusion.from_pretrained(model, index="me/plain", device="cpu")("a cat")


# What can go wrong


def test_a_missing_or_gated_repository_says_what_to_do(shared: TinyHub) -> None:
    with pytest.raises(HubError, match=r"expected the repository no/such on the hub, there is none .*hf auth login"):
        KnnDiffusion.from_pretrained("no/such", device="cpu")
    shared.gated.add(NAME)
    with pytest.raises(HubError, match=rf"{NAME} is gated: accept its terms on {hub_constants.ENDPOINT}/{NAME}"):
        KnnDiffusion.from_pretrained(NAME, device="cpu")


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_says_to_log_in(shared: TinyHub, status: int) -> None:
    shared.status = status
    with pytest.raises(HubError, match=r"hf auth login"):
        KnnDiffusion.from_pretrained(NAME, device="cpu")


def test_a_repository_without_a_model_is_refused(hub: TinyHub) -> None:
    hub.folder("some/text-model").mkdir(parents=True)
    (hub.folder("some/text-model") / "config.json").write_text("{}")
    with pytest.raises(HubError, match=r"expected pipeline\.json in some/text-model, the repository has none"):
        KnnDiffusion.from_pretrained("some/text-model", device="cpu")


def test_without_a_network_the_error_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    point_at(f"http://127.0.0.1:{port}", tmp_path, monkeypatch)
    with pytest.raises(HubError, match=rf"{NAME} could not be reached on the hub .*: check the network") as caught:
        KnnDiffusion.from_pretrained(NAME, device="cpu")
    assert "\n" not in str(caught.value)


def test_offline_mode_says_so(shared: TinyHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE forbids to download it: unset that"):
        KnnDiffusion.from_pretrained(NAME, device="cpu")


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O: No space left on device")]
)
def test_a_full_disk_says_so(shared: TinyHub, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    real = huggingface_hub.snapshot_download

    def full(*arguments: object, **options: object) -> str:
        if options.get("local_files_only"):
            return real(*arguments, **options)  # type: ignore[arg-type, return-value, call-overload]
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(KnnDiffusionError, match=rf"the disk is full, {NAME} is not whole: free space"):
        KnnDiffusion.from_pretrained(NAME, device="cpu")


def test_without_the_package_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'knn-diffusion\[hub\]'"):
        KnnDiffusion.from_pretrained(NAME, device="cpu")


# Encoders


def test_an_encoder_of_the_hub_is_the_one_in_its_folder(hub: TinyHub, tmp_path: Path) -> None:
    folder = published(hub.folder("openai/clip-vit-base-patch32"), "clip")
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"anything")
    (folder / "custom.py").write_text("raise SystemExit")
    with pytest.raises(HubError, match="no leave to download it: run `hf download openai/clip-vit-base-patch32`"):
        load_encoder("clip")
    assert hub.asked == []
    there = load_encoder("openai/clip-vit-base-patch32", network=True)
    assert {"open_clip_pytorch_model.bin", "custom.py"}.isdisjoint(hub.fetched())
    assert there.fingerprint == load_encoder(folder).fingerprint == load_encoder("clip").fingerprint
    assert there.name == "openai/clip-vit-base-patch32"
    assert (there.encode_texts(TEXTS) == load_encoder(folder).encode_texts(TEXTS)).all()


def test_an_index_is_built_with_an_encoder_of_the_hub_and_opened_without_the_network(
    hub: TinyHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    published(hub.folder("laion/tiny"), "clip")
    pictures = draw_pictures(tmp_path / "pictures")
    assert main(["index", "build", str(pictures), "--output", "mine", "--encoder", "laion/tiny"]) == 0
    hub.asked.clear()
    with ImageIndex.open("mine") as index:
        assert len(index.search_text("a red heart", k=3).ids[0]) == 3
    shutil.rmtree(tmp_path / "cache")
    capsys.readouterr()
    assert main(["index", "search", "mine", "--text", "a red heart"]) == 1
    assert "run `hf download laion/tiny`" in capsys.readouterr().err
    assert hub.asked == []


def test_pickled_weights_are_read_without_running_them(hub: TinyHub, tmp_path: Path) -> None:
    folder = published(hub.folder("old/clip"), "clip")
    whole = load_encoder(folder).fingerprint
    weights = load_file(folder / "model.safetensors")
    weights["text_model.embeddings.position_ids"] = torch.arange(12)[None]  # as in OpenAI's files
    torch.save({**weights, "hostile": Call(os.mkdir, str(tmp_path / "touched"))}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert load_encoder("old/clip", network=True).fingerprint == whole
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_the_files_that_an_index_names_are_fetched_and_no_others(
    hub: TinyHub, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = published(hub.folder("big/clip"), "clip")
    whole = load_encoder(folder).fingerprint
    index = cut(folder, ending)
    for stray in ("modeling.py", f"model-00007-of-00009.{ending}", "tf_model.bin"):
        (folder / stray).write_bytes(b"anything")
    assert load_encoder("big/clip", network=True).fingerprint == whole
    fetched = {name for name in hub.fetched() if name.endswith((".safetensors", ".bin", ".py"))}
    assert fetched == set(json.loads(index.read_text())["weight_map"].values())
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    assert load_encoder("big/clip").fingerprint == whole


def test_an_index_of_the_hub_that_names_other_places_fetches_nothing_more(hub: TinyHub) -> None:
    folder = published(hub.folder("evil/clip"), "clip")
    index = cut(folder)
    index.write_text(json.dumps({"weight_map": {"logit_scale": "../../../../.ssh/id.bin"}}))
    with pytest.raises(CheckpointError, match=r"files beside .*, it names '\.\./"):
        load_encoder("evil/clip", network=True)
    assert not any(name.endswith((".bin", ".safetensors")) for name in hub.fetched())


def test_a_file_that_is_not_needed_is_not_missed(hub: TinyHub, model: Path) -> None:
    shutil.copytree(model, hub.folder(NAME))
    assert (fetch(NAME, ("README.md",), needs="README.md") / "README.md").is_file()
    assert hub.fetched() == {"README.md"}
    KnnDiffusion.from_pretrained(NAME, device="cpu")
