"""Strict configurations: frozen dataclasses, and files that may hold nothing unknown."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from knn_diffusion.config import config, from_dict, read_mapping, require, to_dict
from knn_diffusion.errors import ConfigError


@config
class Inner:
    size: int = 2

    def __post_init__(self) -> None:
        require(self.size >= 1, "size", self.size, "at least 1")


@config
class Outer:
    name: str
    pair: tuple[float, float] = (0.5, 1.0)
    inner: Inner = Inner()


def test_a_configuration_comes_back_from_its_plain_values() -> None:
    made = Outer(name="a", pair=(1.0, 2.0), inner=Inner(size=3))
    assert from_dict(Outer, to_dict(made)) == made


def test_a_configuration_is_frozen_and_takes_names_only() -> None:
    made = Outer(name="a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.name = "b"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Outer("a")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"name": "a", "colour": 1},
            r"file: expected a setting \(name, pair, inner\), got colour: choose one of them",
        ),
        ({"name": "a", "size": 1}, r"got size: did you mean inner\.size\?"),
        (
            {"name": "a", "inner": {"sise": 1}},
            r"file: expected a setting of inner \(size\), got inner\.sise: did you mean inner\.size\?",
        ),
        ({}, "file: name: .*required: add it"),
        ({"name": "a", "inner": {"size": "many"}}, r"file: inner\.size: .*, got 'many': change it"),
        ({"name": "a", "inner": {"size": 0}}, "size must be at least 1, got 0: change size"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(values: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        from_dict(Outer, values, source="file")
    assert "\n" not in str(caught.value)


def test_toml_and_json_files_are_read_alike(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('name = "a"\n[inner]\nsize = 4\n', encoding="utf-8")
    (tmp_path / "a.json").write_text('{"name": "a", "inner": {"size": 4}}', encoding="utf-8")
    read = [from_dict(Outer, read_mapping(tmp_path / name)) for name in ("a.toml", "a.json")]
    assert read == [Outer(name="a", inner=Inner(size=4))] * 2


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.toml", b"name = ", "is not valid toml"),
        ("a.json", b"{", "is not valid json"),
        ("a.json", b"\xff\xfe", "is not valid json"),
        ("a.json", b"[1]", "expected a mapping of settings, got list"),
        ("missing.json", None, "cannot be read"),
    ],
)
def test_a_file_that_cannot_be_used_says_why(tmp_path: Path, name: str, content: bytes | None, text: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=text):
        read_mapping(tmp_path / name)


@pytest.mark.parametrize("depth", [60, 900, 100_000])
@pytest.mark.parametrize(("name", "opening", "closing"), [("a.json", '{"a": [', "]}"), ("a.toml", "[", "]")])
def test_files_that_are_nested_deeply_are_one_line(
    tmp_path: Path, name: str, opening: str, closing: str, depth: int
) -> None:
    inner = opening * depth + closing * depth
    (tmp_path / name).write_text(inner if name.endswith(".json") else f"a = {inner}")
    with pytest.raises(ConfigError, match=r"is not valid (json|toml): ") as raised:
        read_mapping(tmp_path / name)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_a_wrong_value_is_shown_in_part(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        from_dict(Outer, {"name": [["x" * 1000] * 100]})
    assert len(str(raised.value)) < 400
