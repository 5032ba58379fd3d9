"""Which configuration a training run has: a preset, a file or that of the model it goes on from, then single changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from knn_diffusion.errors import UsageError

Run = TypeVar("Run")


def chosen_run(
    part: str,
    presets: Mapping[str, Run],
    *,
    preset: str | None,
    file: Path | None,
    changes: Sequence[str] | None,
    init: str | None,
) -> Run:
    """The run to train `part` with.

    Raises: UsageError when none or two are named; ConfigError for an unknown key or an impossible value.
    """
    from knn_diffusion.config import from_dict, read_mapping, to_dict

    if preset is not None and file is not None:
        raise UsageError("expected --preset or --config, got both: name one, and change single values with --set")
    if preset is not None and preset not in presets:
        raise UsageError(f"expected a preset for the {part} ({', '.join(presets)}), got {preset!r}: choose one of them")
    if preset is not None:
        values, source = to_dict(presets[preset]), f"preset {preset}"
    elif file is not None:
        values, source = read_mapping(file), str(file)
    elif init is not None:
        values, source = _trained_run(part, init), f"model {init}"
    else:
        raise UsageError(f"expected --preset ({', '.join(presets)}), --config FILE or --init MODEL, got none: name one")
    made = merged(values, parse_changes(changes or []))
    return from_dict(type(next(iter(presets.values()))), made, source=source)


def parse_changes(changes: Sequence[str]) -> dict[str, Any]:
    """Nested values of ["training.num_steps=1000", …]; a value that is no TOML is text.

    Raises: UsageError for a change without a name or a value.
    """
    parsed: dict[str, Any] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or not all(name.split(".")):
            raise UsageError(f"expected --set name=value, got {change!r}: for instance --set training.num_steps=1000")
        value: Any = _value(text)
        for part in reversed(name.split(".")):
            value = {part: value}
        parsed = merged(parsed, value)
    return parsed


def merged(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `changes` laid over them, mapping into mapping."""
    result = dict(values)
    for name, change in changes.items():
        inside = isinstance(change, dict) and isinstance(result.get(name), dict)
        result[name] = merged(result[name], change) if inside else change
    return result


def _trained_run(part: str, init: str) -> dict[str, Any]:
    """The configuration a model's part was trained with, as its folder remembers it."""
    from knn_diffusion.checkpoint import CONFIG_FILE
    from knn_diffusion.config import read_mapping
    from knn_diffusion.model_folder import resolve_model

    facts = read_mapping(resolve_model(init) / part / CONFIG_FILE).get("extra", {})
    if "run" not in facts:
        raise UsageError(
            f"expected {init} to remember how its {part} was trained, it does not: add --preset or --config"
        )
    return dict(facts["run"])


def _value(text: str) -> Any:
    from knn_diffusion.config import parse_toml

    try:
        return parse_toml(f"value = {text}")["value"]
    except ValueError:
        return text
