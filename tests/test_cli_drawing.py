"""What `generate` and `edit` write: new names beside what is there, sizes, formats and grounds, nothing lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_cli import fails, model, pictures, run
from tiny_world import SIZE, TransparentTokenizer, same_pixels

from knn_diffusion import KnnDiffusion
from knn_diffusion.images import open_image, read_settings

__all__ = ["model", "pictures", "run"]  # fixtures


@pytest.fixture
def transparent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model that is loaded draws with alpha."""
    start = KnnDiffusion.__init__

    def with_alpha(self: KnnDiffusion, model: Any, *args: Any, **options: Any) -> None:
        start(self, replace(model, tokenizer=TransparentTokenizer(model.tokenizer)), *args, **options)

    monkeypatch.setattr(KnnDiffusion, "__init__", with_alpha)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_with_files_gets_more_and_none_is_overwritten(
    run: Any, model: Path, pictures: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "contact-sheet.png").write_bytes(b"mine too")
    options = ("--model", model, "--output", tmp_path)
    assert run("generate", "a cat", "a hat", *options).code == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    found = run("generate", "a cat", "--seed", 1, *options, "--json").json
    assert Path(found["images"][0]).name == "002-a-cat-0.png"
    assert Path(found["contact_sheet"]).name == "contact-sheet-3.png"
    assert run("edit", pictures / "red-bar.png", "a hat", *options).code == 0
    assert names(tmp_path) == [
        "000-a-cat-0.png", "001-a-hat-0.png", "002-a-cat-0.png", "003-a-hat-0.png",
        "contact-sheet-2.png", "contact-sheet-3.png", "contact-sheet-4.png", "contact-sheet.png", "mine.txt",
    ]  # fmt: skip
    assert all(path.read_bytes() == content for path, content in before.items())


def test_without_output_everything_goes_into_one_folder(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run("generate", "a cat", "--model", model).code == 0
    assert names(tmp_path) == ["output"]
    assert names(tmp_path / "output") == [
        "000-a-cat-0.png", "001-a-cat-0.png", "contact-sheet-2.png", "contact-sheet.png",
    ]  # fmt: skip


def test_a_folder_that_cannot_be_written_to_is_noticed_before_the_model_is_loaded(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    fails(run("generate", "a cat", "--output", tmp_path / "file"), 2, "expected a folder for --output")
    fails(
        run("generate", "a cat", "--output", tmp_path / "file" / "out"), 1, "expected a folder that can be written to"
    )

    def denied(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("knn_diffusion.cli.terminal.tempfile.TemporaryFile", denied)
    monkeypatch.setattr(KnnDiffusion, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    fails(run("generate", "a cat", "--output", tmp_path), 1, "cannot (Permission denied): choose another --output")


def test_a_folder_made_for_nothing_goes_again(run: Any, model: Path, tmp_path: Path) -> None:
    fails(run("generate", "a cat", "-k", 99, "--model", model, "--output", tmp_path / "out"), 2, "k")
    assert names(tmp_path) == []


def test_ctrl_c_keeps_every_image_that_was_drawn(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, drawn = KnnDiffusion.decode, []

    def interrupted(self: KnnDiffusion, tokens: Any) -> Any:
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.extend(decode(self, tokens))
        return drawn[-1:]

    monkeypatch.setattr(KnnDiffusion, "decode", interrupted)
    ran = run("generate", "a cat", "-n", 60, "--model", model, "--output", tmp_path / "out")
    assert (ran.code, ran.err.strip()) == (130, "error: interrupted: everything saved so far is kept")
    assert names(tmp_path / "out") == [f"000-a-cat-{i}.png" for i in range(3)]
    for i, image in enumerate(drawn):
        assert same_pixels(open_image(tmp_path / "out" / f"000-a-cat-{i}.png"), image)


@pytest.mark.parametrize("file_format", ["png", "webp", "svg"])
def test_no_file_carries_a_path_of_this_machine(
    run: Any, model: Path, tmp_path: Path, file_format: str, transparent: None
) -> None:
    if file_format == "svg":
        pytest.importorskip("vtracer")
    found = run(
        "generate", "a cat", "--model", model, "--format", file_format, "--output", tmp_path / "out", "--json"
    ).json
    assert all(Path(one["source"]).is_absolute() for one in found["neighbors"])
    settings = read_settings(found["images"][0])
    assert [one["source"] for one in settings["neighbors"]] == [Path(one["source"]).name for one in found["neighbors"]]
    assert "/" not in json.dumps(settings)


def test_sizes_formats_and_grounds_of_a_sticker(run: Any, model: Path, tmp_path: Path, transparent: None) -> None:
    def drawn(*options: object) -> tuple[dict[str, Any], Image.Image]:
        found = run("generate", "a cat", "--model", model, "--output", tmp_path, *options, "--json").json
        with Image.open(found["images"][0]) as opened:
            return found, opened.copy()

    found, plain = drawn()
    assert (plain.mode, plain.size, plain.getpixel((0, 0))[3]) == ("RGBA", (SIZE, SIZE), 0)  # type: ignore[index]
    assert "finish" not in found
    found, webp = drawn("--size", 512, "--format", "webp", "--background", "teal")
    assert (webp.mode, webp.size) == ("RGB", (512, 512))
    assert Path(found["images"][0]).stat().st_size < 100_000
    assert (found["format"], found["finish"]) == ("webp", {"size": 512, "background": "#008080"})
    found, bordered = drawn("--border", "--shadow", "--size", 100, "--background", "transparent")
    assert found["finish"] == {"size": 100, "border": 0.03, "shadow": True}
    assert (bordered.mode, bordered.size) == ("RGBA", (100, 100))
    found, wide = drawn("--border-width", 0.1, "--size", 100)
    assert found["finish"] == {"size": 100, "border": 0.1}
    assert wide.getpixel((6, 50)) == (255, 255, 255, 255)


def test_an_svg_is_written_and_the_sheet_shows_the_sticker(
    run: Any, model: Path, tmp_path: Path, transparent: None
) -> None:
    pytest.importorskip("vtracer")
    found = run(
        "generate", "a cat", "--model", model, "--format", "svg", "--border", "--background", "teal",
        "--output", tmp_path, "--json",
    ).json  # fmt: skip
    assert Path(found["images"][0]).read_text().startswith("<svg ")
    sheet = open_image(found["contact_sheet"])
    assert (0, 128, 128) in {colour for _, colour in sheet.getcolors(10**6)}


def test_without_vtracer_svg_is_refused_before_anything_is_drawn(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vtracer", None)
    ran = run("generate", "a cat", "--model", model, "--format", "svg", "--output", tmp_path / "out")
    fails(ran, 1, "pip install 'knn-diffusion[svg]'")
    assert names(tmp_path) == []


def test_a_webp_that_had_to_give_up_quality_says_so(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knn_diffusion.images.save.WEBP_BYTES", 1200)
    ran = run("generate", "a cat", "--model", model, "--size", 64, "--format", "webp", "--output", tmp_path)
    assert ran.code == 0
    assert "000-a-cat-0.webp: quality " in ran.err
    assert " instead of 90, " in ran.err
