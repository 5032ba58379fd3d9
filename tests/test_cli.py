"""The command line on a tiny world: what it prints, where it writes, how it fails."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image
from tiny_world import SIZE, build_model, draw_pictures, same_pixels

from knn_diffusion import ImageIndex, KnnDiffusion, cli
from knn_diffusion.cli import app, main, spread_values
from knn_diffusion.cli.configuration import chosen_run, merged, parse_changes
from knn_diffusion.cli.terminal import answer, progress, shown
from knn_diffusion.cli.train import _watched
from knn_diffusion.doctor import _package, within
from knn_diffusion.errors import UsageError
from knn_diffusion.images import grid, open_image, read_settings, square
from knn_diffusion.retrieval.dedup import DedupConfig
from knn_diffusion.retrieval.drift import Drift
from knn_diffusion.retrieval.store import Store
from knn_diffusion.training.options import StepProgress


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "tiny", pictures)


@pytest.fixture
def index(tmp_path: Path, model: Path, pictures: Path) -> Path:
    folder = tmp_path / "index"
    assert main(["index", "build", str(pictures), "--output", str(folder), "--encoder", str(model / "encoder")]) == 0
    return folder


class Ran:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call


def fails(ran: Ran, code: int, *texts: str) -> None:
    """One line on standard error, nothing on standard output, and this exit code."""
    assert (ran.code, ran.out) == (code, ""), ran.err
    assert re.fullmatch(r"error: [^\n]+\n", ran.err), ran.err
    for text in texts:
        assert text in ran.err


def test_generate_json_is_a_flat_object_for_one_prompt(run: Any, model: Path, tmp_path: Path) -> None:
    options = ("--model", model, "-n", 2, "-k", 4, "--steps", 3, "--guidance-scale", 1.5, "--seed", 9)
    ran = run("generate", "a red heart", *options, "--output", tmp_path / "out", "--json")
    assert ran.code == 0
    found = ran.json
    assert (found["prompt"], found["seed"], found["steps"], found["guidance_scale"]) == ("a red heart", 9, 3, 1.5)
    assert (found["shortfall"], found["seconds"] > 0, len(found["neighbors"])) == (0, True, 4)
    assert all(isinstance(one["id"], str) and {"score", "source"} <= one.keys() for one in found["neighbors"])
    names = [Path(path).name for path in found["images"]]
    assert names == ["000-a-red-heart-0.png", "000-a-red-heart-1.png"]
    assert all(Path(path).is_absolute() and open_image(path).size == (SIZE, SIZE) for path in found["images"])
    assert Path(found["contact_sheet"]).is_file()


def test_generate_json_holds_results_for_several_prompts(run: Any, model: Path, tmp_path: Path) -> None:
    ran = run("generate", "a cat", "a hat", "--model", model, "--output", tmp_path / "out", "--json")
    assert [one["prompt"] for one in ran.json["results"]] == ["a cat", "a hat"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "000-a-cat-0.png", "001-a-hat-0.png", "contact-sheet.png",
    ]  # fmt: skip


def test_generate_prints_paths_for_people(run: Any, model: Path, tmp_path: Path) -> None:
    ran = run("generate", "a cat", "--model", model, "--output", tmp_path / "out")
    assert [Path(line).name for line in ran.out.splitlines()] == ["000-a-cat-0.png", "contact-sheet.png"]


def test_command_line_and_python_draw_the_same_pixels(run: Any, model: Path, tmp_path: Path) -> None:
    found = run(
        "generate", "a cat", "a hat", "--model", model, "-n", 2, "--seed", 4, "--output", tmp_path / "o", "--json"
    ).json
    out = KnnDiffusion.from_pretrained(model)("a hat", num_images_per_prompt=2, seed=4)
    for path, image in zip(found["results"][1]["images"], out.images, strict=True):
        assert same_pixels(open_image(path), image)


def test_images_carry_the_settings_that_draw_them_again(run: Any, model: Path, tmp_path: Path) -> None:
    path = Path(
        run("generate", "a cat", "--model", model, "--seed", 6, "--output", tmp_path / "o", "--json").json["images"][0]
    )
    settings = read_settings(path)
    assert (settings["prompt"], settings["seed"], settings["k"], settings["model"]) == ("a cat", 6, 3, "tiny")
    with Image.open(path) as opened:
        parameters = opened.info["parameters"]
    assert parameters.startswith("a cat\nSteps: 4")
    assert "Seed: 6" in parameters


def test_edit_writes_images_and_strength_0_keeps_the_pixels(
    run: Any, model: Path, pictures: Path, tmp_path: Path
) -> None:
    source = pictures / "red-circle.png"
    found = run("edit", source, "a hat", "--strength", 0, "--model", model, "--output", tmp_path / "o", "--json").json
    assert same_pixels(open_image(found["images"][0]), square(open_image(source), SIZE))


@pytest.mark.parametrize(
    "case",
    [
        (["generate", ""], 2, "describe the picture in words"),
        (["generate", "cat " * 500], 2, "say it more shortly"),
        (["generate", "a cat", "-k", "99"], 2, "k"),
        (["generate", "a cat", "-n", "0"], 2, "num_images_per_prompt"),
        (["generate", "a cat", "--steps", "1000"], 2, "at most 8 steps"),
        (["generate", "a cat", "--seed", "x"], 2, "--seed"),
        (["generate"], 2, "PROMPT"),
        (["generate", "a cat", "--model", "no-such-model"], 1, "bundled name"),
        (["generate", "a cat", "--index", "no-such-index"], 1, "no-such-index"),
        (["edit", "no-such.png", "a cat"], 1, "no-such.png"),
        (["edit", "no-such.png", "a cat", "--strength", "2"], 1, "no-such.png"),
        (["paint"], 2, "paint"),
        (
            ["index", "build", "a", "--output", "i", "--ray-address", "auto"],
            2,
            "expected --ray with --ray-address, got",
        ),
        (["index", "build", "a", "--output", "i", "--ray-gpus", "1"], 2, "got --ray-gpus alone: add --ray"),
        (["train", "tokenizer", "--preset", "stickers-cpu", "--output", "run"], 2, "add --images"),
        (["train", "denoiser", "--init", "stickers", "--index", "i", "--output", "run"], 2, "add --images"),
        (["generate", "a cat", "--colour"], 2, "--colour"),
        (["generate", "a cat", "--size", "8"], 2, "expected size from 16 to 4096"),
        (["generate", "a cat", "--format", "gif"], 2, "expected format as one of png, webp, svg"),
        (["generate", "a cat", "--background", "blurple"], 2, "a CSS colour name or #rrggbb"),
        (["generate", "a cat", "--background", "teal"], 2, "expected drawings with transparency"),
        (["generate", "a cat", "--border-width", "0.5"], 2, "expected a border from 0 to 0.2"),
        (["edit", "no-such.png", "a cat", "--resampler", "cubic"], 2, "expected resampler as one of"),
        (["generate", "a cat", "--exclude", "nosuch"], 2, "expected the id of an image in"),
        (["generate", "a cat", "--device", "tpu"], 2, "(auto, cpu, cuda, mps), got 'tpu': use --device auto"),
    ],
)
def test_failures_are_one_line_and_an_exit_code(
    run: Any, model: Path, tmp_path: Path, case: tuple[list[str], int, str]
) -> None:
    arguments, code, text = case
    if arguments[0] in ("generate", "edit"):
        arguments = [*arguments, "--output", str(tmp_path / "out")]
        if "--model" not in arguments:
            arguments += ["--model", str(model)]
    fails(run(*arguments), code, text)
    assert not list((tmp_path / "out").glob("*"))


def test_a_full_disk_is_one_line_and_keeps_what_was_written(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, calls = os.replace, []

    def full(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("knn_diffusion.checkpoint.os.replace", full)
    fails(run("generate", "a cat", "-n", 4, "--model", model, "--output", tmp_path / "out"), 1, "the disk is full")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000-a-cat-0.png", "000-a-cat-1.png"]


def test_a_bare_full_disk_error_is_one_line_too(run: Any, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "somewhere")

    monkeypatch.setattr(KnnDiffusion, "from_pretrained", full)
    fails(run("generate", "a cat", "--model", model), 1, "somewhere: the disk is full")


def test_ctrl_c_is_130_and_keeps_the_images_drawn_before(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = KnnDiffusion.generate

    def interrupted(self: KnnDiffusion, prompt: str, request: Any) -> Any:
        if prompt == "a hat":
            raise KeyboardInterrupt
        return generate(self, prompt, request)

    monkeypatch.setattr(KnnDiffusion, "generate", interrupted)
    ran = run("generate", "a cat", "a hat", "--model", model, "--output", tmp_path / "out")
    assert (ran.code, ran.err.strip()) == (130, "error: interrupted: everything saved so far is kept")
    assert (tmp_path / "out" / "000-a-cat-0.png").is_file()


def test_index_verbs_build_add_remove_and_tell(run: Any, index: Path, tmp_path: Path) -> None:
    told = run("index", "info", index, "--json").json
    assert (told["count"], told["dim"]) == (12, 8)
    assert told["encoder"]
    Image.new("RGB", (20, 20), (250, 0, 250)).save(tmp_path / "pink.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    added = run("index", "add", index, tmp_path / "pink.png", tmp_path / "broken.png", "--json")
    assert added.code == 0
    assert (added.json["added"], len(added.json["skipped"])) == (1, 1)
    assert "broken.png" in added.json["skipped"][0]["source"]
    found = run("index", "search", index, "--image", tmp_path / "pink.png", "-k", 2, "--json").json["neighbors"]
    assert found[0]["source"].endswith("pink.png")
    assert found[0]["score"] == pytest.approx(1, abs=1e-2)
    assert run("index", "remove", index, found[0]["id"], "--json").json["removed"] == 1
    assert run("index", "info", index, "--json").json["count"] == 12
    assert run("index", "check", index).code == 0


def test_adding_says_when_the_cells_are_worth_training_again(
    run: Any, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"count": 1000, "later": 100, "cells": 64, "new_cells": 64, "earlier_distance": 0.2}
    Image.new("RGB", (20, 20), (250, 0, 250)).save(tmp_path / "pink.png")
    for far, advised in ((0.21, False), (0.42, True)):
        monkeypatch.setattr(ImageIndex, "drift", lambda _, far=far: Drift(later_distance=far, **facts))
        added = run("index", "add", index, tmp_path / "pink.png", "--json")
        assert added.code == 0
        assert ("they lie 2.1 times as far" in added.err) == advised
        assert (f"knn-diffusion index tune {index} --retrain" in added.err) == advised


def test_index_search_finds_by_text(run: Any, index: Path) -> None:
    found = run("index", "search", index, "--text", "a red heart", "-k", 3, "--json").json["neighbors"]
    assert len(found) == 3
    assert all({"id", "score", "source"} <= one.keys() for one in found)


def test_index_search_filters_by_metadata_and_shows_it(run: Any, index: Path, tmp_path: Path) -> None:
    for name, colour in (("pink", (250, 0, 250)), ("grey", (90, 90, 90))):
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"{name}.png")
    (tmp_path / "facts.csv").write_text("source,width\npink.png,640\ngrey.png,100\nlost.png,1\n")
    options = ("--metadata", tmp_path / "facts.csv")
    added = run("index", "add", index, tmp_path / "pink.png", tmp_path / "grey.png", *options)
    assert "rows of metadata that tell of none of these images, or of several: 1" in added.err
    search = ("index", "search", index, "--image", tmp_path / "grey.png", "-k", 1)
    found = run(*search, "--where", "width >= 512 AND source LIKE '%.png'", "--json").json["neighbors"]
    assert (Path(found[0]["source"]).name, found[0]["metadata"]) == ("pink.png", {"width": 640})
    assert "metadata" not in run(*search, "--where", "width IS NULL", "--json").json["neighbors"][0]
    few = run(*search[:-1], 3, "--where", "width >= 512")
    assert few.err == "found 1 of the 3 asked for: all others are left out by --where, or copies of these\n"
    fails(
        run(*search, "--where", "widht > 5"), 2, "expected a condition over id, source, key, added_at, width, such as"
    )


def test_index_search_wants_exactly_one_query(run: Any, index: Path, pictures: Path) -> None:
    fails(run("index", "search", index), 2, "--text or --image")
    fails(run("index", "search", index, "--text", "a cat", "--image", pictures / "red-bar.png"), 2, "--text or --image")


def test_an_index_smaller_than_the_usual_k_gives_all_it_has(
    run: Any, model: Path, pictures: Path, tmp_path: Path
) -> None:
    small = tmp_path / "small"
    two = sorted(pictures.iterdir())[:2]
    assert run("index", "build", *two, "--output", small, "--encoder", model / "encoder").code == 0
    command = ("generate", "a cat", "--model", model, "--index", small)
    ran = run(*command, "--output", tmp_path / "one")
    assert (ran.code, ran.err) == (0, "the index holds 2 images: -k is 2, not the model's 3\n")
    ran = run(*command, "--output", tmp_path / "two", "--json")
    assert (ran.json["k"], ran.err) == (2, "")
    fails(run(*command, "-k", 3, "--output", tmp_path / "three"), 2, "k must be between 1 and 2")
    search = ("index", "search", small, "--text", "a cat")
    ran = run(*search)
    assert (len(ran.out.splitlines()), ran.err) == (2, "the index holds 2 images: -k is 2, not 10\n")
    assert run(*search, "--json").err == ""
    fails(run(*search, "-k", 10), 2, "k must be between 1 and 2")


def test_index_info_says_size_rule_and_whether_it_changes(run: Any, index: Path, tmp_path: Path) -> None:
    with ImageIndex.open(index) as opened:
        opened.save(tmp_path / "sealed", sealed=True)
        opened.set_rule(DedupConfig(cosine=0.93, manhattan=2.0))
    told = run("index", "info", index).out
    assert re.search(r"^bytes: [\d,]+ \([\d.]+ kB\)$", told, re.M)
    assert "copies: cosine above 0.93 or small pictures within 2 levels\n" in told
    assert "framing: trim-15/16\npreviews: 128 pixels\n" in told
    assert "read_only: False (images can be added and removed)\n" in told
    assert "read_only: True (additions and removals are refused)\n" in run("index", "info", tmp_path / "sealed").out
    assert run("index", "info", index, "--json").json["read_only"] is False


def test_index_build_and_info_say_how_pictures_are_framed(run: Any, model: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "art"
    pictures.mkdir()
    drawn = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    drawn.paste((255, 255, 255, 255), (10, 10, 30, 30))
    drawn.save(pictures / "white.png")
    build = ("index", "build", pictures, "--encoder", model / "encoder", "--output")
    assert run(*build, tmp_path / "one").out.endswith(f"1 images in {tmp_path / 'one'}, framing trim-15/16\n")
    assert run(*build, tmp_path / "two", "--json").json["framing"] == "trim-15/16"
    told = run("index", "info", tmp_path / "one", "--json").json
    assert (told["framing"], told["preview_side"]) == ("trim-15/16", 128)
    with Store.open(tmp_path / "one") as store, store.live.transaction() as change:
        change.database.execute("DELETE FROM settings WHERE name IN ('framing', 'preview_side')")
    old = "framing: none, it was built before pictures were framed\npreviews: 64 pixels\n"
    assert old in run("index", "info", tmp_path / "one").out
    with ImageIndex.open(tmp_path / "two") as opened:
        shown = opened.preview(opened.ids[0])
    assert shown is not None
    assert shown.mode == "RGBA"
    assert shown.getpixel((64, 64)) == (255, 255, 255, 255)
    assert shown.getchannel("A").getpixel((1, 1)) == 0


HOSTILE = "a\x1b[2J\x1b]0;title\x07\nb\r\x9b1m\u202egnp\u2028.png"


def test_names_of_files_cannot_write_to_the_terminal(run: Any, model: Path, pictures: Path, tmp_path: Path) -> None:
    content = sorted(pictures.iterdir())[0].read_bytes()
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for name, data in ((HOSTILE, content), ("no" + HOSTILE, b"nothing")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    built = run("index", "build", tmp_path / "shard.tar", "--output", tmp_path / "i", "--encoder", model / "encoder")
    found = run("index", "search", tmp_path / "i", "--text", "a heart")
    for text in (built.out, built.err, found.out, found.err):
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2028]", text)
    assert len(found.out.splitlines()) == 1
    assert "a?[2J?]0;title??b??1m?gnp?.png" in found.out
    assert (
        run("index", "search", tmp_path / "i", "--text", "a heart", "--json")
        .json["neighbors"][0]["source"]
        .endswith(HOSTILE)
    )


def test_joined_emoji_and_letters_of_all_kinds_stay_as_they_are() -> None:
    line = "👩\u200d🎨 é ü न\u200cम 日本 – “x”\u00a0…"
    assert shown(line) == line


@pytest.mark.parametrize("missing", [("stderr",), ("stdout",), ("stdout", "stderr")])
def test_a_command_works_without_standard_streams(
    missing: tuple[str, ...], index: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in missing:
        monkeypatch.setattr(sys, name, None)
    assert main(["generate", "a cat", "--model", str(model), "--steps", "1", "--output", str(tmp_path / "drawn")]) == 0
    assert main(["index", "search", str(index), "--text", "a cat", "-k", "99"]) == 2
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 2


def test_numbers_of_closed_streams_are_not_given_to_files(tmp_path: Path) -> None:
    code = (
        "import sys; from knn_diffusion.cli.terminal import open_missing_streams; open_missing_streams();"
        f"print(open({str(tmp_path / 'kept')!r}, 'w').fileno() > 2); sys.stderr.write('lost'); sys.stderr.flush()"
    )
    ran = subprocess.run(
        ["sh", "-c", '"$0" -c "$1" 2>&-', sys.executable, code],
        check=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[2])},
    )
    assert (ran.stdout, ran.stderr) == (b"True\n", b"")


def test_a_prompt_is_no_markup_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress() as show:
        for prompt in ("a heart [/b]", "[/]", "a [red] heart", "\x1b[2J"):
            show(f"drawing {prompt}", 1, 2)
    written = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "drawing a heart [/b]" in written
    assert "drawing a [red] heart" in written
    assert "drawing ?[2J" in written


def test_texts_that_the_encoder_cannot_read_are_left_out_of_a_report(run: Any, index: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("a heart\n🍕\na cat\n", encoding="utf-8")
    ran = run("index", "report", index, "--texts", tmp_path / "texts.txt", "-k", 2, "--json")
    assert (ran.code, list(ran.json["curves"])) == (0, ["image", "text"])
    assert ran.err.startswith("left out '🍕': ")
    (tmp_path / "odd.txt").write_text("🍕\n", encoding="utf-8")
    fails_alone = run("index", "report", index, "--texts", tmp_path / "odd.txt", "-k", 2)
    assert (fails_alone.code, fails_alone.out) == (2, "")
    assert "none of 1 is: write others" in fails_alone.err


def test_a_search_is_drawn_into_a_picture(run: Any, index: Path, tmp_path: Path) -> None:
    ran = run("index", "search", index, "--text", "a heart", "-k", 7, "--picture", tmp_path / "found.png")
    assert (ran.code, len(ran.out.splitlines())) == (0, 7)
    assert open_image(tmp_path / "found.png").width == 5 * 132 + 4
    fails(run("index", "search", index, "--text", "a heart", "--picture", tmp_path / "found.jpg"), 2, "a .png file")


def test_images_are_removed_by_source_and_condition(run: Any, index: Path, pictures: Path) -> None:
    first = sorted(pictures.iterdir())[0]
    assert run("index", "remove", index, "--source", first, "--dry-run").out == "would remove 1\n"
    assert run("index", "remove", index, "--source", first, "--json").json == {"removed": 1, "found": 1, "count": 11}
    fails(run("index", "remove", index, "--source", first), 2, "none came from")
    fails(run("index", "remove", index), 2, "got none: say what to remove")
    assert run("index", "remove", index, "--where", "source LIKE '%heart%' OR key LIKE '%cat%'").code == 0
    left = run("index", "info", index, "--json").json["count"]
    again = run("index", "sync", index, pictures)
    assert (again.code, again.out.splitlines()[-1]) == (0, "--apply does it")
    assert run("index", "sync", index, pictures, "--apply", "--json").json["count"] == 12 > left


def test_index_rule_shows_and_sets_when_two_images_are_copies(run: Any, index: Path) -> None:
    was = run("index", "rule", index, "--json").json
    assert (
        run("index", "rule", index, "--cosine", 0.93).out
        == "copies: cosine above 0.93 or small pictures within 2 levels\n"
    )
    assert run("index", "rule", index, "--manhattan", 1, "--json").json == {"cosine": 0.93, "manhattan": 1.0}
    assert run("index", "info", index, "--json").json["dedup"] == {"cosine": 0.93, "manhattan": 1.0}
    assert run("index", "rule", index, "--calibrate", "--json").json == was
    fails(run("index", "rule", index, "--calibrate", "--cosine", 0.9), 2, "--cosine or --calibrate, got both")
    fails(run("index", "rule", index, "--cosine", 1.5), 2, "cosine must be in (0, 1]")
    fails(run("index", "rule", "stickers", "--cosine", 0.9), 1, "read-only")


def test_index_build_says_what_is_odd_about_pictures_it_uses(run: Any, model: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "art"
    pictures.mkdir()
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(pictures / "a.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (16, 16), "green").save(pictures / "b.png")
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(pictures / "c.png")
    build = ("index", "build", pictures, "--encoder", model / "encoder", "--output")
    ran = run(*build, tmp_path / "one")
    told = ran.err.splitlines()
    assert told[0].startswith(
        f"skipped {pictures / 'c.png'}: expected a picture with something to see, got 64 × 64 pixels"
    )
    assert told[1:] == [
        f"animated or paged files, of which the first picture is used: 1 (first: {pictures / 'a.gif'})",
        f"pictures of less than 32 pixels, which are enlarged: 1 (first: {pictures / 'b.png'})",
    ]
    assert run(*build, tmp_path / "two", "--json").json["hints"] == {
        "first_of_several": {"count": 1, "first": str(pictures / "a.gif")},
        "small": {"count": 1, "first": str(pictures / "b.png")},
    }


def test_index_failures(run: Any, index: Path, model: Path, pictures: Path, tmp_path: Path) -> None:
    encoder = ("--encoder", model / "encoder")
    fails(run("index", "build", pictures, "--output", index, *encoder), 2, str(index.name))
    (tmp_path / "empty").mkdir()
    fails(run("index", "build", tmp_path / "empty", "--output", tmp_path / "new", *encoder), 2, "found none")
    fails(run("index", "search", index, "--text", "a cat", "-k", 99), 2, "12")
    fails(run("index", "info", tmp_path / "nowhere"), 1, "nowhere")
    fails(run("index", "remove", index, "no-such-id"), 2, "no-such-id")


def test_a_read_only_index_is_not_changed(run: Any, index: Path, pictures: Path, tmp_path: Path) -> None:
    with ImageIndex.open(index) as opened:
        opened.save(tmp_path / "sealed", sealed=True)
        first = opened.ids[0]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "sealed").rglob("*")}
    for change in (
        ["add", tmp_path / "sealed", pictures],
        ["remove", tmp_path / "sealed", first],
        ["dedup", tmp_path / "sealed", "--apply"],
    ):
        fails(run("index", *change), 1, "read-only: build one of your own")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "sealed").rglob("*")} == before


def test_copies_are_shown_written_and_drawn_before_any_is_removed(run: Any, index: Path, tmp_path: Path) -> None:
    command = ["index", "dedup", index, "--threshold", 0.999, "--manhattan", 2]
    pink, touched = Image.new("RGB", (20, 20), (250, 0, 250)), Image.new("RGB", (20, 20), (251, 0, 250))
    pink.save(tmp_path / "pink.png")
    touched.save(tmp_path / "touched.png")
    assert run("index", "add", index, tmp_path / "pink.png", tmp_path / "touched.png").code == 0
    table, sheet = tmp_path / "copies.csv", tmp_path / "copies.png"
    told = run(*command, "--report", table, "--picture", sheet, "--json").json
    assert (told["count"], told["copies"], told["groups"], told["removed"]) == (14, 1, 1, 0)
    assert told["largest"][0]["source"].endswith("pink.png")
    assert told["largest"][0]["copies"][0]["source"].endswith("touched.png")
    assert len(table.read_text().splitlines()) == 2
    assert open_image(sheet).width > 200
    assert run("index", "info", index, "--json").json["count"] == 14
    lines = run(*command, "--apply").out.splitlines()
    assert lines[-2].startswith(
        "removed 1 of 14 images, copies of 1 that stay (cosine ≥ 0.999, pictures within 2 levels)"
    )
    assert run("index", "info", index, "--json").json["count"] == 13
    after = run(*command, "--picture", tmp_path / "nothing.png")
    assert after.out.startswith("would remove 0 of 13 images")
    assert "no picture was drawn" in after.err
    assert not (tmp_path / "nothing.png").exists()


def test_wrong_uses_of_dedup_are_refused_before_the_work(run: Any, index: Path, tmp_path: Path) -> None:
    fails(run("index", "dedup", index, "--threshold", 1.5), 2, "threshold must be in (0, 1], got 1.5")
    fails(run("index", "dedup", index, "--threshold", "nan"), 2, "threshold must be in (0, 1], got nan")
    fails(run("index", "dedup", index, "--report", tmp_path / "copies.txt"), 2, "expected a .csv or .jsonl file")
    for name in ("copies.psd", "copies", ".png"):
        expected = f"expected a .png file for the picture, got {tmp_path / name}: change its name"
        fails(run("index", "dedup", index, "--picture", tmp_path / name), 2, expected)
    fails(run("index", "dedup", tmp_path / "nowhere"), 1, "nowhere")


def test_building_from_nothing_readable_fails(run: Any, model: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    ran = run("index", "build", tmp_path / "broken.png", "--output", tmp_path / "new", "--encoder", model / "encoder")
    assert ran.code == 1
    assert "broken.png" in ran.err


def test_check_notices_a_damaged_index(run: Any, index: Path) -> None:
    segment = next(path for path in sorted(index.rglob("*.npy")) if "embeddings" in path.name)
    content = bytearray(segment.read_bytes())
    content[-3] ^= 1
    segment.write_bytes(content)
    assert run("index", "check", index).code == 1


def test_doctor_says_what_is_there(run: Any) -> None:
    ran = run("doctor", "--json")
    found = {finding["name"]: finding for finding in ran.json["findings"]}
    assert found["python"]["status"] == "ok"
    assert "draws in" in found["device"]["found"]
    assert ran.code == (0 if ran.json["ok"] else 1)


def test_an_extra_in_a_requirement_is_not_part_of_the_name() -> None:
    found = _package("pytest[dev]>=1", "dev")
    assert (found.name, found.status) == ("pytest", "ok")


def test_version_bounds() -> None:
    assert within("2.13.0+cpu", ">=2.10,<2.14")
    assert not within("2.14.0", ">=2.10,<2.14")
    assert not within("2.9.1", ">=2.10,<2.14")
    assert within("13.0", ">=12.3")


def test_long_training_says_a_line_now_and_then_where_no_bar_can_be_drawn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    monkeypatch.setattr("knn_diffusion.cli.terminal.time.monotonic", lambda: clock[0])
    with _watched("denoiser", Path("run")) as told:
        for number in range(41, 49):
            clock[0] += 10.0
            metrics = {"learning_rate": 0.1, "denoiser/loss": 1.25}
            told.watch(StepProgress(step=number, num_steps=100, metrics=metrics, seconds=clock[0]))
    assert capsys.readouterr().err.splitlines() == [
        "training the denoiser: step 43 of 100, loss 1.25, about 10 min left",
        "training the denoiser: step 46 of 100, loss 1.25, about 9 min left",
    ]


def test_images_may_follow_one_option() -> None:
    spread = spread_values(["train", "tokenizer", "--images", "a", "b", "--output", "o", "--images", "c"])
    assert spread == ["train", "tokenizer", "--images", "a", "--images", "b", "--output", "o", "--images", "c"]
    assert spread_values(["generate", "a", "b"]) == ["generate", "a", "b"]
    assert spread_values(["--images=a", "b", "-k", "3"]) == ["--images=a", "--images", "b", "-k", "3"]


def test_single_values_are_changed_by_name() -> None:
    changes = parse_changes(["training.num_steps=5", "training.precision=float32", "k=[1, 2]"])
    assert changes == {"training": {"num_steps": 5, "precision": "float32"}, "k": [1, 2]}
    assert merged({"training": {"seed": 1}, "k": 3}, changes)["training"] == {
        "seed": 1,
        "num_steps": 5,
        "precision": "float32",
    }
    with pytest.raises(UsageError, match="expected --set name=value"):
        parse_changes(["training"])


def test_an_answer_can_be_printed_in_any_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    result = {"prompt": "een ♥", "source": os.fsdecode(b"caf\xe9.png")}
    for encoding in ("ascii", "latin-1", "utf-8"):
        for as_json in (True, False):
            written = io.BytesIO()
            monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
            answer(result, as_json, lambda: iter(result.values()))
            sys.stdout.flush()
            assert not as_json or json.loads(written.getvalue()) == result


def test_a_training_configuration_must_be_named_once() -> None:
    from knn_diffusion.presets import DENOISERS

    first = next(iter(DENOISERS))
    named: dict[str, Any] = {"preset": first, "file": None, "changes": ["training.seed=3"], "init": None}
    assert chosen_run("denoiser", DENOISERS, **named).training.seed == 3
    with pytest.raises(UsageError, match=f"expected a preset for the denoiser .*{first}"):
        chosen_run("denoiser", DENOISERS, **named | {"preset": "huge"})
    with pytest.raises(UsageError, match="got both"):
        chosen_run("denoiser", DENOISERS, **named | {"file": Path("x.toml")})
    with pytest.raises(UsageError, match="got none"):
        chosen_run("denoiser", DENOISERS, **named | {"preset": None})


def fresh(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


def test_the_command_line_imports_nothing_heavy() -> None:
    loaded = set(fresh("import sys, knn_diffusion.cli; print(*{m.split('.')[0] for m in sys.modules})").split())
    assert loaded.isdisjoint({"torch", "numpy", "PIL", "faiss", "pydantic", "safetensors"})


def test_help_answers_at_once() -> None:
    before = os.times()
    assert "generate" in fresh("import sys; from knn_diffusion.cli import main; sys.exit(main(['--help']))")
    after = os.times()  # of the processor, not of the clock: other work on this machine does not count
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds < 1.5


def leaves(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from leaves(command, (*path, name))
        else:
            yield (*path, name)


def test_every_command_explains_itself_with_an_example_and_knows_json(run: Any) -> None:
    commands = list(leaves(typer.main.get_command(app)))
    assert {("generate",), ("index", "build"), ("train", "denoiser"), ("doctor",)} <= set(commands)
    for command in commands:
        ran = run(*command, "--help")
        assert ran.code == 0
        assert {"Usage:", "Example:", "--json"} <= set(ran.out.split()), command


def test_the_bundled_names_are_exported() -> None:
    import knn_diffusion

    assert {"KnnDiffusion", "ImageIndex", "UsageError"} <= set(dir(knn_diffusion))
    assert knn_diffusion.ImageIndex is ImageIndex
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        knn_diffusion.Nothing  # noqa: B018


def test_a_denoiser_trains_from_a_file_goes_on_and_draws(
    run: Any, model: Path, index: Path, pictures: Path, tmp_path: Path
) -> None:
    facts = json.loads((model / "denoiser" / "config.json").read_text())
    training = {"batch_size": 4, "num_steps": 9, "learning_rate": 1e-3, "checkpoint_every": 1, "warmup_steps": 1}
    values = {"denoiser": facts["config"], "schedule": facts["extra"]["schedule"], "training": training}
    (tmp_path / "run.json").write_text(json.dumps(values | {"conditioning": {"k": 2}}))
    command = ["train", "denoiser", "--config", tmp_path / "run.json", "--images", pictures, "--index", index]
    command += ["--tokenizer", model / "tokenizer", "--output", tmp_path / "run", "--device", "cpu", "--json"]
    fails(run(*command, "--set", "training.no_such=1"), 2, "training.no_such")
    fails(run(*command, "--max-minutes", 0), 2, "expected --max-minutes above 0, got 0: give minutes")
    first = run(*command, "--max-minutes", 1e-6)
    assert (first.code, first.json["finished"], first.json["step"]) == (0, False, 1), first.err
    fails(run(*command), 2, "--resume")
    others = draw_pictures(tmp_path / "others")
    (others / "red-bar.png").unlink()
    refused = [other if other is not pictures else others for other in command]
    fails(run(*refused, "--resume"), 2, f"expected the 12 pictures that {tmp_path / 'run'} was begun with, got 11")
    second = run(*command, "--resume", "--set", "training.learning_rate=0.002")
    assert second.err == "training.learning_rate was 0.001, is 0.002 now\n"
    assert (second.json["finished"], second.json["step"]) == (True, 9)
    fails(run(*command), 2, "already holds a complete run (step 9 of 9), its model lies in")
    people = [one for one in command if one != "--json"]
    again = run(*people, "--resume", "--set", "training.num_steps=8")
    assert again.out.startswith(f"denoiser in {tmp_path / 'run' / 'model'}, complete at step 9")
    drawn = run(
        "generate", "a cat", "--model", second.json["model"], "--index", index, "--output", tmp_path / "o", "--json"
    )
    assert drawn.code == 0, drawn.err


@pytest.mark.parametrize(
    ("label", "plain"), [("é ü ñ Å", "e u n A"), ("a – “b”", 'a - "b"'), ("日本 x", "?? x"), ("Straße", "Strase")]
)
def test_labels_are_drawn_in_letters_that_the_font_has(label: str, plain: str) -> None:
    cell = Image.new("RGB", (8, 8), "white")
    drawn, expected = (grid([cell], 1, 96, [text]) for text in (label, plain))
    assert drawn.tobytes() == expected.tobytes()
