"""What README and docs show is run: Python blocks on a tiny model, command lines through the parser."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny_world import build_model, draw_pictures

from knn_diffusion.cli import app, spread_values

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def command_lines() -> list[str]:
    """Every line of the pages that calls the command line, continued lines joined."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        found += re.findall(r"^ {4}(knn-diffusion [^#\n]+)", text, re.MULTILINE)
    return found


def parse(line: str) -> None:
    command: Any = typer.main.get_command(app)
    arguments = spread_values(shlex.split(line)[1:])
    while hasattr(command, "commands"):
        command = command.commands[arguments.pop(0)]
    command.make_context("knn-diffusion", arguments).close()


def test_pages_show_commands() -> None:
    assert len(command_lines()) >= 8


@pytest.mark.parametrize("line", command_lines())
def test_a_documented_command_is_understood(line: str) -> None:
    parse(line)


def test_a_wrong_command_would_be_noticed() -> None:
    with pytest.raises(Exception, match="No such option"):
        parse("knn-diffusion generate cat --colour red")


def test_the_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_model(tmp_path / "bundles" / "stickers", draw_pictures(tmp_path / "pictures"))
    monkeypatch.setattr("knn_diffusion.model_folder.BUNDLES", tmp_path / "bundles")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for block in [*blocks, (ROOT / "examples" / "quickstart.py").read_text(encoding="utf-8")]:
        exec(compile(block, "example", "exec"), names)
    assert (tmp_path / "heart.png").is_file()
    assert len(names["pipe"].index) >= 12


def test_the_file_tree_names_what_is_there() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("    src/knn_diffusion/\n")[2]
    inside = re.findall(r"^ {6}(\w+/|\w+\.py)  ", tree, re.MULTILINE)
    beside = re.findall(r"^ {4}(\w+/)  ", tree, re.MULTILINE)
    assert len(inside) >= 8
    assert [name for name in inside if not (ROOT / "src" / "knn_diffusion" / name).exists()] == []
    assert [name for name in beside if not (ROOT / name).exists()] == []
