"""Tokens of images in shards: made once, resumed shard by shard, the same however they are made, and never stale."""

from __future__ import annotations

import io
import json
import os
import re
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_distributed import HERE, ray  # noqa: F401
from tiny_world import DIM, GRID, build_model, tiny_encoder

from knn_diffusion import ImageIndex, images
from knn_diffusion.cli import main
from knn_diffusion.errors import FingerprintError, KnnDiffusionError, StoreError, UsageError
from knn_diffusion.image_index import TokenOutput, content_digest, tokenizing
from knn_diffusion.image_index.tokenizing import REMOVED
from knn_diffusion.images import find_files, find_images, pixels_from_uint8, square, to_array
from knn_diffusion.models.encoders import SmallJointEncoder
from knn_diffusion.models.tokenizer import VQGAN, TokenizerConfig
from knn_diffusion.models.tokenizers import load_tokenizer
from knn_diffusion.retrieval.dedup import OFF
from knn_diffusion.tokens import (
    Examples,
    Made,
    Makers,
    TokenFolder,
    Tokenize,
    Unit,
    UnitFacts,
    makers_of,
    units,
    units_of,
    units_of_images,
)
from knn_diffusion.tokens import examples as examples_module
from knn_diffusion.training.options import RunOptions
from knn_diffusion.training.processes import Processes
from knn_diffusion.training.tokens import examples_of, frozen_for_all

CPU = torch.device("cpu")
MAKERS = Makers(tokenizer="t" * 64, seq=4, vocab_size=9, encoder="e" * 64, dim=3)


def picture(seed: int, size: int = 24) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (3, 3, 3), dtype=np.uint8))
    return small.resize((size, size), Image.Resampling.BICUBIC)


def write_shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as shard:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return path


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def shard_of(path: Path, numbers: Sequence[int]) -> Path:
    return write_shard(path, {f"{number:09}.png": encoded(picture(number)) for number in numbers})


@pytest.fixture(autouse=True)
def uncut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loose files are cut where their paths say, which are others in every run."""
    monkeypatch.setattr(units, "CUT", 2**40)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("model")) / "tokenizer"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two shards, one with a member that is no picture, and four files, one of them broken."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in (40, 41, 42):
        picture(number).save(folder / f"{number}.png")
    (folder / "43.png").write_bytes(b"no picture")
    shard_of(folder / "a.tar", range(10))
    write_shard(folder / "b.tar", {"cut.png": b"PNG", **{f"{n}.png": encoded(picture(n)) for n in range(9, 20)}})
    return folder


def by_content(examples: Examples) -> dict[bytes, tuple[bytes, bytes]]:
    records = examples[np.arange(len(examples))]
    contents = (one.tobytes() for one in examples.contents)
    return {
        content: (one["tokens"].tobytes(), one["embedding"].tobytes())
        for content, one in zip(contents, records, strict=True)
    }


def made(count: int = 5, seed: int = 0) -> Made:
    rng = np.random.default_rng(seed)
    return Made(
        contents=rng.integers(0, 256, (count, 32), dtype=np.uint8),
        embeddings=rng.normal(size=(count, 3)).astype(np.float16),
        tokens=rng.integers(0, 9, (count, 4)).astype(np.uint16),
        skipped=[{"source": "x.png", "reason": "broken"}],
    )


# Units


def test_a_shard_is_a_unit_and_keeps_its_name_whatever_comes_beside_it(photos: Path) -> None:
    def names() -> dict[str, str]:
        return {Path(one.files[0]).name: one.name for one in units_of(find_files([photos]))}

    before = names()
    assert list(before) == ["40.png", "a.tar", "b.tar"]
    shard_of(photos / "aa.tar", range(20, 25))
    picture(50).save(photos / "44.png")
    after = names()
    assert [name for name in before if before[name] != after[name]] == ["40.png"]
    os.utime(photos / "a.tar", ns=(1, 1))
    assert [name for name in after if after[name] != names()[name]] == ["a.tar"]


def test_files_are_cut_into_the_same_units_before_and_after_they_are_opened(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (photos / "c.tar").write_bytes(b"no shard" * 100)
    write_shard(photos / "41.tar", {})
    monkeypatch.setattr(units, "UNIT_FILES", 3)
    closed, opened = units_of(find_files([photos])), units_of_images(find_images([photos]))
    assert [len(one.open()) for one in closed] == [3, 0, 1, 10, 12, 1]
    closed = [one for one in closed if one.open()]
    assert closed == opened
    assert {image for one in closed for image in one.open()} == set(find_images([photos]))
    assert [list(one.open()) for one in closed] == [list(one.open()) for one in opened]


def test_another_loose_file_moves_no_cut_but_those_next_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "CUT", 4)
    for number in range(100):
        (tmp_path / f"{number:03}.png").write_bytes(b"")
    before = {one.name for one in units_of(find_files([tmp_path]))}
    assert 5 < len(before) < 60
    for name in ("0000.png", "050x.png"):
        (tmp_path / name).write_bytes(b"")
        after = {one.name for one in units_of(find_files([tmp_path]))}
        assert len(before - after) <= 1
        before = after


def test_the_same_files_have_the_same_units_from_any_folder(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    assert units_of(find_files(["a.tar"])) == units_of(find_files([photos / "a.tar"]))


def test_pictures_without_a_file_are_no_unit(tmp_path: Path, tokenizer: Path) -> None:
    with (
        ImageIndex.build([picture(1)], None, tiny_encoder()) as index,
        pytest.raises(UsageError, match="expected files to tokenize, got picture 0: save the pictures"),
    ):
        index.add([picture(2)], tokens=TokenOutput(tokenizer, tmp_path / "tokens"))


# Parts


def write(folder: TokenFolder, unit: str, *parts: Made, files: Sequence[str] = ()) -> None:
    written = [folder.write_part(unit, number, part) for number, part in enumerate(parts)]
    skipped = [one for part in parts for one in part.skipped]
    folder.close(unit, UnitFacts(files=files, parts=written, skipped=skipped))


def test_units_come_back_as_one_array_and_numpy_reads_them(tmp_path: Path) -> None:
    folder, parts = TokenFolder(tmp_path / "tokens", MAKERS), [made(5), made(2, seed=2), made(3, seed=1)]
    assert folder.kept("b") is None
    write(folder, "c", parts[2])
    write(folder, "a", parts[0], parts[1])
    write(folder, "b")
    assert folder.units() == ["a", "b", "c"]
    found = folder.examples("cab")  # by name, whatever order they are asked for in
    assert len(found) == 10
    np.testing.assert_array_equal(found.contents, np.concatenate([one.contents for one in parts]))
    rows = np.array([9, 0, 6, 6, 5])
    np.testing.assert_array_equal(found[rows]["tokens"], np.concatenate([one.tokens for one in parts])[rows])
    np.testing.assert_array_equal(found[rows]["embedding"], np.concatenate([one.embeddings for one in parts])[rows])
    assert found[rows[:0]].shape == (0,)
    assert [dict(one) for one in found.skipped] == [{"source": "x.png", "reason": "broken"}] * 3
    plain = np.load(tmp_path / "tokens" / "parts" / "a-0000.examples.npy", mmap_mode="r")
    np.testing.assert_array_equal(plain["tokens"], parts[0].tokens)
    again = TokenFolder(tmp_path / "tokens", MAKERS)
    assert again.examples().digest == found.digest != folder.examples("a").digest
    other = replace(parts[2], embeddings=-parts[2].embeddings)
    write(again, "c", other)
    assert again.examples("c").contents_digest == folder.examples("c").contents_digest
    assert again.examples().digest != found.digest


def test_parts_are_let_go_when_too_many_are_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples_module, "MAPPED", 2)
    folder = TokenFolder(tmp_path, MAKERS)
    write(folder, "a", *(made(2, seed) for seed in range(5)))
    found = folder.examples()
    for _ in range(2):
        for row in (0, 9, 4, 3, 7, 1):
            expected = made(2, row // 2).tokens[row % 2]
            np.testing.assert_array_equal(found[np.array([row])]["tokens"][0], expected)
            assert len(found._mapped) <= 2


@pytest.mark.parametrize("name", ["parts/c-0000.examples.npy", "parts/c-0000.contents.npy", "units/c.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "delete"])
def test_a_damaged_unit_is_told_and_made_again_when_its_json_is_deleted(tmp_path: Path, name: str, harm: str) -> None:
    folder = TokenFolder(tmp_path, MAKERS)
    write(folder, "c", made())
    path = tmp_path / name
    content = path.read_bytes()
    if harm == "delete":
        path.unlink()
    else:
        path.write_bytes(content[:-7] if harm == "cut" else content[:-7] + b"#######")
    if harm != "flip" and name.startswith("parts"):
        assert folder.kept("c") is None  # so that the next command makes it again
    cure = (
        "make them again"
        if (name, harm) == ("units/c.json", "delete")
        else "delete .*give the command that made it again"
    )
    with pytest.raises(StoreError, match=cure):
        _ = [(found := folder.examples("c")).contents, found[np.arange(5)]]
    (tmp_path / "units" / "c.json").unlink(missing_ok=True)
    assert folder.kept("c") is None
    write(folder, "c", made())
    np.testing.assert_array_equal(folder.examples("c")[np.arange(5)]["tokens"], made().tokens)


def test_a_full_disk_leaves_no_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = TokenFolder(tmp_path, MAKERS)
    real = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        if len(content) > 150:
            raise OSError(28, "No space left on device")
        return real(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(KnnDiffusionError, match="could not be written .the disk is full."):
        write(folder, "c", made())
    assert folder.kept("c") is None
    assert len(folder.examples()) == 0


def test_a_unit_that_is_made_again_does_not_count_until_it_is_whole(tmp_path: Path) -> None:
    folder = TokenFolder(tmp_path, MAKERS)
    write(folder, "c", made(), made(seed=1))
    folder.write_part("c", 0, made(seed=2))  # and killed
    assert folder.units() == []
    assert folder.kept("c") is None


def test_what_is_replaced_is_set_aside_and_stays_for_runs_that_know_it(tmp_path: Path) -> None:
    def paths(*names: str) -> list[str]:
        return [str(tmp_path / name) for name in names]

    for name in ("one.tar", "a.png", "b.png", "kept.png"):
        (tmp_path / name).write_bytes(b"")
    folder = TokenFolder(tmp_path / "tokens", MAKERS)
    write(folder, "shard-before", made(), files=paths("one.tar"))
    write(folder, "files-before", made(), files=paths("a.png", "b.png", "gone.png"))
    write(folder, "others", made(), files=paths("b.png", "kept.png"))
    write(folder, "moved", made(), files=paths("moved.tar"))
    found = [Unit("shard-now", paths("one.tar"), list), Unit("files-now", paths("a.png", "b.png", "new.png"), list)]
    for unit in found:
        write(folder, unit.name, made(seed=1), files=unit.files)
    assert folder.set_aside(found) == 2
    assert folder.units() == ["files-now", "moved", "others", "shard-now"]
    assert folder.set_aside(found) == 0
    np.testing.assert_array_equal(folder.examples(["shard-before"]).contents, made().contents)
    write(folder, "shard-before", made(seed=3), files=paths("one.tar"))  # the file is as it was
    assert "shard-before" in folder.units()


@pytest.mark.parametrize("changed", [{"tokenizer": "u" * 64}, {"encoder": "f" * 64}, {"format_version": 2}])
def test_a_folder_is_of_one_tokenizer_and_one_encoder(tmp_path: Path, changed: dict[str, Any]) -> None:
    TokenFolder(tmp_path, MAKERS)
    before = (tmp_path / "tokens.json").read_bytes()
    values = {name: getattr(MAKERS, name) for name in ("tokenizer", "seq", "vocab_size", "encoder", "dim")}
    with pytest.raises(FingerprintError, match="was made with the .*: choose another folder, or go on with that"):
        TokenFolder(tmp_path, Makers(**(values | changed)))
    assert (tmp_path / "tokens.json").read_bytes() == before


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UsageError, match="expected a folder of tokens .tokens.json, .* or a new one, .* is neither"):
        TokenFolder(tmp_path, MAKERS)
    (tmp_path / "tokens.json").write_text("{}")
    with pytest.raises(UsageError, match="expected a folder of tokens in .*, got .*tokenizer"):
        TokenFolder(tmp_path, MAKERS)


# Tokens


def test_tokens_are_those_of_the_tokenizer_whatever_comes_beside_them(tokenizer: Path) -> None:
    network, _ = load_tokenizer(tokenizer)
    tokenize, images = Tokenize(network), [picture(n, 20 + n) for n in range(70)]
    assert tokenize.batch == 16
    alone = np.concatenate([tokenize([one]) for one in images])
    np.testing.assert_array_equal(tokenize(images), alone)
    pixels = pixels_from_uint8(np.stack([to_array(square(one, tokenize.size)) for one in images[:5]]))
    np.testing.assert_array_equal(alone[:5], network.encode(pixels).numpy())
    assert alone.dtype == np.uint16
    assert tokenize([]).shape == (0, GRID**2)


def test_tokens_of_a_transparent_sticker_do_not_depend_on_its_margins() -> None:
    torch.manual_seed(0)
    network = VQGAN(TokenizerConfig(image_size=32, grid=8, patch=4, channels=8, channel_multipliers=(1,), alpha=True))
    sticker = Image.new("RGBA", (60, 60))
    sticker.paste((200, 30, 90, 255), (0, 0, 60, 40))
    margins = Image.new("RGBA", (300, 200), (9, 9, 9, 0))
    margins.paste(sticker, (150, 20))
    one, other = Tokenize(network)([sticker, margins])
    np.testing.assert_array_equal(one, other)
    assert len(set(one.tolist())) > 1


# Beside an index


def test_an_index_made_with_tokens_is_the_one_without(photos: Path, tmp_path: Path, tokenizer: Path) -> None:
    plain = ImageIndex.build([photos], tmp_path / "plain", tiny_encoder(), rule=OFF)
    output = TokenOutput(tokenizer, tmp_path / "tokens")
    both = ImageIndex.build([photos], tmp_path / "both", tiny_encoder(), rule=OFF, tokens=output)
    assert both.report == plain.report
    assert both.ids == plain.ids
    np.testing.assert_array_equal(both.embeddings, plain.embeddings)
    network, _ = load_tokenizer(tokenizer)
    examples = folder_of(tmp_path / "tokens", network).examples()
    assert len(examples.skipped) == 2
    places = both.frozen().places_of(examples.contents)
    assert set(places.tolist()) == set(range(len(both))) == set(range(23))
    records = examples[np.arange(len(examples))]
    np.testing.assert_array_equal(records["embedding"], both.embeddings[places])
    expected = {content_digest(picture(n)): Tokenize(network)([picture(n)])[0] for n in [*range(20), 40, 41, 42]}
    for content, tokens in zip(examples.contents, records["tokens"], strict=True):
        np.testing.assert_array_equal(tokens, expected[content.tobytes().hex()])


def folder_of(path: Path, network: Any) -> TokenFolder:
    return TokenFolder(path, makers_of(network, encoder=tiny_encoder().fingerprint, dim=DIM))


def test_what_is_tokenized_is_passed_over_shard_by_shard(
    photos: Path, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, seen = TokenOutput(tokenizer, tmp_path / "tokens"), list[int]()
    real = Tokenize.__call__
    monkeypatch.setattr(Tokenize, "__call__", lambda self, images: seen.append(len(images)) or real(self, images))
    interrupt: list[int] = []

    def stop(what: str, done: int, total: int) -> None:
        interrupt.append(done)
        if done == 18:  # four files, a.tar, and four of b.tar
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ImageIndex.build([photos], tmp_path / "index", tiny_encoder(), tokens=output, progress=stop)
    assert len(list((tmp_path / "tokens" / "parts").glob("*.contents.npy"))) == 2
    seen.clear()
    index = ImageIndex.build([photos], tmp_path / "index", tiny_encoder(), tokens=output)
    assert sum(seen) == 11
    assert index.report is not None
    assert (len(index), index.report.already_present + index.report.added) == (23, 24)
    assert len(index.report.skipped) == 2
    seen.clear()
    again = index.add([photos], tokens=output)
    assert (again.added, again.already_present, len(again.skipped), sum(seen)) == (0, 24, 2, 0)
    index.remove(index.ids[4:5])
    assert index.add([photos], tokens=output).added == 1
    assert sum(seen) == 0


def test_images_of_an_index_get_tokens_without_being_encoded_again(
    photos: Path, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ImageIndex.build([photos], tmp_path / "index", tiny_encoder(), rule=OFF) as index:

        def never(self: SmallJointEncoder, images: Sequence[Image.Image]) -> np.ndarray:
            raise AssertionError("an image is encoded again")

        monkeypatch.setattr(SmallJointEncoder, "encode_images", never)
        report = index.add([photos], tokens=TokenOutput(tokenizer, tmp_path / "tokens"))
        assert (report.added, report.already_present) == (0, 24)
        examples = folder_of(tmp_path / "tokens", load_tokenizer(tokenizer)[0]).examples()
        places = index.frozen().places_of(examples.contents)
        assert set(places.tolist()) == set(range(23))
        np.testing.assert_array_equal(examples[np.arange(24)]["embedding"], index.embeddings[places])


def test_a_new_index_is_filled_from_images_whose_tokens_are_there_and_stay(
    photos: Path, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = TokenOutput(tokenizer, tmp_path / "tokens")
    ImageIndex.build([photos], tmp_path / "one", tiny_encoder(), tokens=output)
    before = {path: path.read_bytes() for path in (tmp_path / "tokens").rglob("*.*")}
    with monkeypatch.context() as patch:
        patch.setattr(Tokenize, "__call__", None)
        assert len(ImageIndex.build([photos / "a.tar"], tmp_path / "two", tiny_encoder(), tokens=output)) == 10
    assert {path: path.read_bytes() for path in (tmp_path / "tokens").rglob("*.*")} == before


def test_tokens_made_on_ray_are_those_of_one_process(
    ray: Any,  # noqa: F811
    photos: Path,
    tmp_path: Path,
    tokenizer: Path,
) -> None:
    found = {}
    for name, spread in (("plain", None), ("spread", HERE)):
        output = TokenOutput(tokenizer, tmp_path / f"{name} tokens")
        index = ImageIndex.build([photos], tmp_path / name, tiny_encoder(), ray=spread, tokens=output)
        assert index.report is not None
        examples = folder_of(tmp_path / f"{name} tokens", load_tokenizer(tokenizer)[0]).examples()
        found[name] = index.ids, by_content(examples), examples.skipped, (index.report.added, len(index.report.skipped))
    assert found["plain"] == found["spread"]


def test_a_shard_has_tokens_of_its_own_for_what_lies_in_others_too(tmp_path: Path, tokenizer: Path) -> None:
    shards = [shard_of(tmp_path / name, range(3)) for name in ("a.tar", "b.tar")]
    output = TokenOutput(tokenizer, tmp_path / "tokens")
    with ImageIndex.build(shards, None, tiny_encoder(), rule=OFF, tokens=output) as index:
        assert len(index) == 3
    folder = folder_of(tmp_path / "tokens", load_tokenizer(tokenizer)[0])
    parts = [folder.examples([one.name]) for one in units_of(find_files(shards))]
    assert by_content(parts[0]) == by_content(parts[1])
    assert len(by_content(parts[0])) == 3


def test_large_shards_have_several_parts(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard, whole = shard_of(tmp_path / "a.tar", range(11)), TokenOutput(tokenizer, tmp_path / "whole")
    with ImageIndex.build([shard], None, tiny_encoder(), rule=OFF, tokens=whole) as index:
        monkeypatch.setattr(tokenizing, "PART_IMAGES", 4)
        index.add([shard], tokens=TokenOutput(tokenizer, tmp_path / "cut"))
    network, _ = load_tokenizer(tokenizer)
    one, other = (folder_of(tmp_path / name, network).examples() for name in ("whole", "cut"))
    assert (len(one.parts), len(other.parts)) == (1, 3)
    np.testing.assert_array_equal(one.contents, other.contents)
    assert (one[np.arange(11)] == other[np.arange(11)]).all()


def test_what_could_not_be_read_is_tried_again_alone(photos: Path, tmp_path: Path, tokenizer: Path) -> None:
    output, shard = TokenOutput(tokenizer, tmp_path / "tokens"), photos / "a.tar"
    times = os.stat(shard)
    content = bytearray(shard.read_bytes())
    place = content.index(b"IHDR", content.index(b"000000007.png"))
    content[place : place + 4] = b"XXXX"
    sound = shard.read_bytes()
    shard.write_bytes(content)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    with ImageIndex.build([shard], None, tiny_encoder(), rule=OFF, tokens=output) as index:
        assert index.report is not None
        assert (index.report.added, len(index.report.skipped)) == (9, 1)
        shard.write_bytes(sound)  # as a disk of a network that answers again
        os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
        report = index.add([shard], tokens=output)
        assert (report.added, report.already_present, report.skipped) == (1, 9, [])
        found = folder_of(tmp_path / "tokens", load_tokenizer(tokenizer)[0]).examples()
        assert (len(found), len(found.parts), list(found.skipped)) == (10, 2, [])
        assert sorted(index.frozen().places_of(found.contents).tolist()) == list(range(10))


def test_images_that_are_removed_meanwhile_are_named_and_come_back(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard, network = shard_of(tmp_path / "a.tar", range(6)), load_tokenizer(tokenizer)[0]
    folder = folder_of(tmp_path / "tokens", network)
    with ImageIndex.build([shard], None, tiny_encoder(), rule=OFF) as index:
        real = Tokenize.__call__

        def removing(self: Tokenize, images: Sequence[Image.Image]) -> np.ndarray:
            index.remove(index.ids[2:3])
            return real(self, images)

        with monkeypatch.context() as patch:
            patch.setattr(Tokenize, "__call__", removing)
            index.tokenize(units_of(find_files([shard])), folder, Tokenize(network))
        (gone,) = folder.examples().skipped
        assert gone == {"source": f"{shard}::000000002.png", "reason": REMOVED}
        index.tokenize(units_of(find_files([shard])), folder, Tokenize(network))
        assert (len(folder.examples()), list(folder.examples().skipped)) == (6, [])


# A run's own


def run_of(sources: Sequence[Path], tokenizer: Path, place: Path, folder: Path | None = None) -> Examples:
    with ImageIndex.build([picture(n) for n in range(9)], None, tiny_encoder(), rule=OFF) as index:
        options = RunOptions(output=place)
        made = examples_of(sources, index, load_tokenizer(tokenizer)[0], folder, Processes(device=CPU), options)
        frozen_for_all(index, Processes(device=CPU), options)
        return made


def test_a_run_without_usable_images_says_why(photos: Path, tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(UsageError, match="expected readable images, all 1 failed .first: expected .*43.png"):
        run_of([photos / "43.png"], tokenizer, tmp_path / "run")
    with pytest.raises(
        UsageError, match="expected a folder of tokens, .*other does not exist: name one that index build"
    ):
        run_of([], tokenizer, tmp_path / "run", tmp_path / "other")
    assert not (tmp_path / "other").exists()
    folder_of(tmp_path / "other", load_tokenizer(tokenizer)[0])
    with pytest.raises(UsageError, match="expected tokens in .*other, found none: name folders with --images"):
        run_of([], tokenizer, tmp_path / "run", tmp_path / "other")


def test_a_run_that_has_begun_goes_on_with_what_it_was_begun_with(
    photos: Path, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, run = tmp_path / "tokens", tmp_path / "run"
    first = run_of([photos / "a.tar"], tokenizer, tmp_path / "other", tokens)
    begun = run_of([], tokenizer, run, tokens)
    assert begun.digest == first.digest
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    run_of([photos / "b.tar"], tokenizer, tmp_path / "other", tokens)
    shard_of(photos / "a.tar", range(30, 33))
    run_of([photos / "a.tar"], tokenizer, tmp_path / "third", tokens)
    assert len(run_of([], tokenizer, tmp_path / "new", tokens)) == 3 + 11
    assert run_of([], tokenizer, run, tokens).digest == begun.digest
    with pytest.raises(
        UsageError, match="expected the 10 pictures that .*run was begun with, got 11, not the same: resume"
    ):
        run_of([photos / "b.tar"], tokenizer, run, tokens)
    monkeypatch.setattr(images, "find_files", None)  # nothing is listed
    (tmp_path / "third" / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert len(run_of([photos / "a.tar"], tokenizer, tmp_path / "third", tokens)) == 3


def test_the_same_pictures_are_the_same_however_they_are_named(photos: Path, tmp_path: Path, tokenizer: Path) -> None:
    named = run_of([photos], tokenizer, tmp_path / "one", tmp_path / "tokens")
    assert run_of([], tokenizer, tmp_path / "two", tmp_path / "tokens").digest == named.digest


def test_another_index_is_told_of(photos: Path, tmp_path: Path, tokenizer: Path) -> None:
    said: list[str] = []
    options = RunOptions(output=tmp_path / "run", notice=said.append)
    run_of([photos / "a.tar"], tokenizer, tmp_path / "run")
    with ImageIndex.build([picture(n) for n in range(8)], None, tiny_encoder(), rule=OFF) as index:
        frozen_for_all(index, Processes(device=CPU), options)
        assert said == []
        (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
        index.add([picture(99)])
        for _ in range(2):
            frozen_for_all(index, Processes(device=CPU), options)
    assert said == ["the index is not as it was when the run was begun: its neighbors are found anew"]


def test_what_a_run_skipped_is_listed_while_it_is_true(photos: Path, tmp_path: Path, tokenizer: Path) -> None:
    run_of([photos], tokenizer, tmp_path / "run")
    skipped = json.loads((tmp_path / "run" / "skipped.json").read_text())
    assert [Path(one["source"]).name for one in skipped] == ["43.png", "b.tar::cut.png"]
    run_of([photos / "a.tar"], tokenizer, tmp_path / "run")
    assert not (tmp_path / "run" / "skipped.json").exists()


# Embeddings that came without pictures


def imported_index(tmp_path: Path, change: Callable[[np.ndarray], np.ndarray]) -> ImageIndex:
    """As clip-retrieval leaves the embeddings of ten pictures, by the keys of their shard."""
    from pyarrow import parquet, table

    folder = tmp_path / "clip"
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir(parents=True)
    rows = tiny_encoder().encode_images([picture(number) for number in range(10)])
    np.save(folder / "img_emb" / "img_emb_0.npy", change(rows).astype(np.float16))
    keys = [f"{number:09}" for number in range(10)]
    parquet.write_table(
        table({"image_path": keys, "caption": ["a cat"] * 10}), folder / "metadata" / "metadata_0.parquet"
    )
    return ImageIndex.import_embeddings(folder, tmp_path / "index", tiny_encoder())


def tokenized(
    index: ImageIndex, shard: Path, tokenizer: Path, place: Path, notice: Callable[[str], None] | None = None
) -> Examples:
    network, _ = load_tokenizer(tokenizer)
    folder = folder_of(place, network)
    index.tokenize(units_of(find_files([shard])), folder, Tokenize(network), notice=notice)
    return folder.examples()


def test_shards_find_their_imported_embeddings_by_key(tmp_path: Path, tokenizer: Path) -> None:
    pytest.importorskip("pyarrow")
    with imported_index(tmp_path, lambda rows: rows + 0.001) as index:
        shard = shard_of(tmp_path / "0.tar", [*range(10), 30])
        found = tokenized(index, shard, tokenizer, tmp_path / "tokens")
        places = index.frozen().places_of(found.contents)
        assert places.tolist() == [*range(10), -1]
        np.testing.assert_array_equal(found[np.arange(10)]["embedding"], index.embeddings)
        own = tiny_encoder().encode_images([picture(30)])
        np.testing.assert_allclose(found[np.array([10])]["embedding"], own, atol=1e-3)


def test_keys_that_name_other_pictures_are_not_believed(tmp_path: Path, tokenizer: Path) -> None:
    pytest.importorskip("pyarrow")
    said: list[str] = []
    with imported_index(tmp_path, lambda rows: -rows) as index:
        found = tokenized(index, shard_of(tmp_path / "0.tar", range(10)), tokenizer, tmp_path / "tokens", said.append)
        assert len(said) == 1
        assert re.search(
            r"0.tar::.*png is not the image that the index has by its name .cosine -1.00.: images of", said[0]
        )
        assert index.frozen().places_of(found.contents).tolist() == [-1] * 10
        own = tiny_encoder().encode_images([picture(number) for number in range(10)])
        np.testing.assert_allclose(found[np.arange(10)]["embedding"], own, atol=1e-3)


def test_one_wrong_image_at_the_end_of_a_shard_is_noticed(tmp_path: Path, tokenizer: Path) -> None:
    pytest.importorskip("pyarrow")

    def last_two_swapped(rows: np.ndarray) -> np.ndarray:
        return rows[[*range(8), 9, 8]]

    with imported_index(tmp_path, last_two_swapped) as index:
        found = tokenized(index, shard_of(tmp_path / "0.tar", range(10)), tokenizer, tmp_path / "tokens")
        assert index.frozen().places_of(found.contents).tolist() == [-1] * 10


def test_a_key_of_several_embeddings_tells_nothing(tmp_path: Path, tokenizer: Path) -> None:
    pytest.importorskip("pyarrow")
    with imported_index(tmp_path, lambda rows: rows) as index:
        twin = write_shard(tmp_path / "0.tar", {"a/000000001.png": encoded(picture(1)), "2.png": encoded(picture(2))})
        found = tokenized(index, twin, tokenizer, tmp_path / "tokens")
        assert index.frozen().places_of(found.contents).tolist() == [1, -1]


# The command line


def test_the_commands_of_the_documentation_make_tokens_and_train_on_them(
    photos: Path, tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: str) -> dict[str, Any]:
        assert main([*words, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    index, tokens = str(tmp_path / "index"), str(tmp_path / "tokens")
    encoder = str(tokenizer.parent / "encoder")
    beside = ["--tokenizer", str(tokenizer), "--tokens", tokens]
    built = run("index", "build", str(photos / "a.tar"), "--output", index, "--encoder", encoder, *beside)
    assert built["added"] == 10
    assert run("index", "add", index, str(photos / "b.tar"), *beside)["added"] == 10
    denoiser = json.loads((tokenizer.parent / "denoiser" / "config.json").read_text())
    run_file = tmp_path / "run.json"
    training = {"batch_size": 4, "num_steps": 2, "learning_rate": 1e-3, "warmup_steps": 0}
    values = {"denoiser": denoiser["config"], "schedule": denoiser["extra"]["schedule"], "training": training}
    run_file.write_text(json.dumps(values | {"conditioning": {"k": 2}}))
    options = ["--config", str(run_file), "--index", index, "--tokenizer", str(tokenizer), "--device", "cpu"]
    made = run("train", "denoiser", *options, "--tokens", tokens, "--output", str(tmp_path / "run"))
    assert (made["step"], made["finished"]) == (2, True)
    assert json.loads((tmp_path / "run" / "examples.json").read_text())["images"] == 21
    before = sorted((tmp_path / "tokens" / "parts").iterdir())
    other = ["--tokens", tokens, "--images", str(photos / "b.tar"), "--output", str(tmp_path / "other")]
    run("train", "denoiser", *options, *other)
    assert json.loads((tmp_path / "other" / "examples.json").read_text())["images"] == 11
    assert sorted((tmp_path / "tokens" / "parts").iterdir()) == before


def test_a_folder_of_tokens_is_checked(
    photos: Path, tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = tmp_path / "tokens"
    ImageIndex.build([photos], None, tiny_encoder(), tokens=TokenOutput(tokenizer, tokens))
    command = ["tokenizer", "check-tokens", str(tokens)]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = {"sound": True, "units": 3, "images": 24, "skipped": 2, "tokens_per_image": GRID**2, "dim": DIM}
    assert {name: found[name] for name in expected} == expected
    assert main(command) == 0
    assert capsys.readouterr().out.startswith("sound, 24 images of 3 shards or groups of files, 2 skipped")
    parts = sorted((tokens / "parts").iterdir())
    parts[0].write_bytes(parts[0].read_bytes()[:-1] + b"#")
    parts[-1].unlink()
    (tokens / "units" / "odd.json").write_text("{")
    assert main(command) == 1
    said = capsys.readouterr().err
    for what in (
        f"{parts[0].name} is damaged",
        f"{parts[-1].name} is missing",
        "odd.json is damaged",
        "delete the .json",
    ):
        assert what in said
    assert main(["tokenizer", "check-tokens", str(photos)]) == 2
    assert "expected a folder of tokens in" in capsys.readouterr().err


def test_tokens_without_a_tokenizer_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["index", "build", str(tmp_path), "--output", str(tmp_path / "index"), "--tokens", str(tmp_path / "tokens")]
    assert main(words) == 2
    assert "expected --tokens and --tokenizer together, got one of them" in capsys.readouterr().err
