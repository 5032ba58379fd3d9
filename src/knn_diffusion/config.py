"""Strict files for frozen dataclasses: JSON and TOML in, JSON out, unknown keys refused."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, dataclass_transform

from knn_diffusion.errors import ConfigError

T = TypeVar("T")


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
        place = ".".join(str(part) for part in first["loc"]) or cls.__name__
        got = "" if first["type"] == "missing" else f", got {first['input']!r}"
        raise ConfigError(
            f"{source}: {place}: {first['msg'].lower()}{got}: see {cls.__name__} for its fields"
        ) from None


def to_dict(value: Any) -> dict[str, Any]:
    """Plain values of a config dataclass, ready for JSON."""
    return asdict(value)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a .json or .toml file.

    Raises: ConfigError when the file is missing, of another kind, or does not parse.
    """
    try:
        text = path.read_text(encoding="utf-8")
        parsed = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
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
