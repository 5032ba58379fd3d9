"""Strict files for frozen dataclasses: JSON and TOML in, JSON out, unknown keys refused."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform, get_args, get_type_hints

from knn_diffusion.errors import ConfigError

T = TypeVar("T")
MAX_DEPTH = 50
"""Mappings and lists inside one another in a file."""
SHOWN = 200
"""Characters of a wrong value that a message shows."""


@dataclass_transform(kw_only_default=True, frozen_default=True)
def config(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only, slotted dataclass whose files may hold no unknown key."""
    made = dataclass(frozen=True, kw_only=True, slots=True)(cls)
    made.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return made


def require(holds: bool, name: str, value: object, rule: str) -> None:
    """Raise a ConfigError naming field, value and rule unless the rule holds; for `__post_init__`."""
    if not holds:
        raise ConfigError(f"{name} must be {rule}, got {value!r}: change {name}")


def from_dict(cls: type[T], values: Any, source: str = "configuration") -> T:
    """Validate plain values (as parsed from a file) into the dataclass `cls`.

    Raises: ConfigError naming the first wrong key, what was expected and what came.
    """
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        path = [str(part) for part in first["loc"]]
        if first["type"] == "unexpected_keyword_argument":
            raise ConfigError(f"{source}: {_unknown(cls, path)}") from None
        place = ".".join(path) or cls.__name__
        cure = ": add it" if first["type"] == "missing" else f", got {repr(first['input'])[:SHOWN]}: change it"
        raise ConfigError(f"{source}: {place}: {first['msg'].lower()}{cure}") from None


def _unknown(cls: type, path: list[str]) -> str:
    """What could have been meant by a setting that does not exist: the names of its section, and the closest."""
    for part in path[:-1]:
        hint = get_type_hints(cls).get(part, cls)
        cls = next((one for one in (hint, *get_args(hint)) if is_dataclass(one)), cls)  # type: ignore[assignment]
    names, section = [one.name for one in fields(cls)], ".".join(path[:-1])
    close = [".".join([*path[:-1], one]) for one in get_close_matches(path[-1], names, 1)]
    if not close:  # the right name, without its section
        hints = get_type_hints(cls).items()
        close = [f"{name}.{path[-1]}" for name, hint in hints if path[-1] in getattr(hint, "__dataclass_fields__", ())]
    cure = f"did you mean {' or '.join(close)}?" if close else "choose one of them"
    place = ".".join(path)
    return f"expected a setting{f' of {section}' if section else ''} ({', '.join(names)}), got {place}: {cure}"


def parse_toml(text: str) -> dict[str, Any]:
    """As `parse_json`, of TOML."""
    try:
        parsed = tomllib.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _refuse_depth(parsed)
    return parsed


def to_dict(value: Any) -> dict[str, Any]:
    """Plain values of a config dataclass, ready for JSON."""
    return asdict(value)


def parse_json(text: str | bytes) -> Any:
    """What JSON of somebody's file holds. Raises: ValueError for what is no JSON, or nested deeper than any of ours."""
    try:
        parsed = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _refuse_depth(parsed)
    return parsed


def _refuse_depth(parsed: Any) -> None:
    """Deep values would end whatever walks through them: a comparison, a copy, a message that shows them."""
    level, depth = [parsed], 0
    while level:
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError("nested too deeply")


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a .json or .toml file.

    Raises: ConfigError when the file is missing, of another kind, or does not parse.
    """
    try:
        text = path.read_text(encoding="utf-8")
        parsed = parse_toml(text) if path.suffix == ".toml" else parse_json(text)
    except OSError as error:
        raise ConfigError(
            f"expected a configuration file, {path} cannot be read ({error.strerror}): check the path"
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"{path} is not valid {path.suffix.lstrip('.') or 'JSON'}: {error}: mend or re-create it"
        ) from None
    if not isinstance(parsed, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(parsed).__name__}: wrap it in {{}}")
    return parsed
