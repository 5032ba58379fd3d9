"""Checkpoints of a training run: everything needed to go on exactly, in safetensors and JSON."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from knn_diffusion.checkpoint import (
    TEMPORARY,
    apply_weights,
    atomic_folder,
    file_digest,
    load_weights_file,
    save_weights,
    write_json,
)
from knn_diffusion.config import read_mapping
from knn_diffusion.errors import CheckpointError, ConfigError

KEPT = 2
_STATE, _FACTS = "state.safetensors", "state.json"
_MAY_CHANGE = {"num_steps", "learning_rate", "final_learning_rate", "clip_norm"}
_MAY_CHANGE |= {"log_every", "validate_every", "checkpoint_every", "precision"}
"""Settings of the training loop that a resumed run may ask for anew."""
Settings = Mapping[str, object]
Optimizers = Mapping[str, torch.optim.Optimizer]


def save_checkpoint(
    folder: Path, *, step: int, modules: nn.Module, average: nn.Module, optimizers: Optimizers, settings: Settings
) -> None:
    """Write `step-…` atomically under `folder`; remove all but the last two, and what a killed run left half-written.

    Args: settings: everything that decides the run, plain and nested; those of the loop under "training".
    """
    tensors = {f"modules.{name}": value for name, value in modules.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    for phase, optimizer in optimizers.items():
        tensors |= {f"optimizer.{phase}.{name}": value for name, value in _flat(optimizer).items()}
    with atomic_folder(folder / f"step-{step:08d}") as temporary:
        save_weights(temporary / _STATE, tensors)
        facts = {"step": step, "settings": settings, "sha256": file_digest(temporary / _STATE)}
        write_json(temporary / _FACTS, facts)
    for old in [*_newest_first(folder)[KEPT:], *folder.glob(f"{TEMPORARY}*")]:
        shutil.rmtree(old, ignore_errors=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint under `folder`, None when there is none."""
    return next(iter(_newest_first(folder)), None)


def planned_steps(checkpoint: Path) -> tuple[int, int] | None:
    """The step a checkpoint was written after and those of its whole run, None when it does not tell."""
    try:
        facts = read_mapping(checkpoint / _FACTS)
        return int(facts["step"]), int(facts["settings"]["training"]["num_steps"])
    except (ConfigError, KeyError, TypeError, ValueError):
        return None


def load_checkpoint(
    folder: Path,
    *,
    modules: nn.Module,
    average: nn.Module,
    optimizers: Optimizers,
    settings: Settings,
    notice: Callable[[str], None] | None = None,
) -> int:
    """Restore the newest sound checkpoint; a damaged one is passed over for the one before it.

    Args: notice: told a line for each setting that may change and did.

    Returns: the step it was written after.

    Raises: CheckpointError when none is sound; ConfigError when the run was started with other settings.
    """
    problems = []
    for candidate in _newest_first(folder):
        try:
            facts = read_mapping(candidate / _FACTS)
            stored = facts["settings"]
            tensors = load_weights_file(candidate / _STATE, facts["sha256"])
        except KeyError as error:
            problems.append(f"{candidate} was written by another version of this package, it lacks {error}")
            continue
        except (CheckpointError, ConfigError) as error:
            problems.append(str(error))
            continue
        for line in _changes(stored, settings, candidate):
            if notice is not None:
                notice(line)
        apply_weights(modules, _under("modules.", tensors), str(candidate))
        apply_weights(average, _under("average.", tensors), str(candidate))
        for phase, optimizer in optimizers.items():
            _restore(optimizer, _under(f"optimizer.{phase}.", tensors))
        return int(facts["step"])
    raise CheckpointError(
        f"no checkpoint under {folder} is sound ({'; '.join(problems)}): start again with another --output"
    )


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True) if folder.is_dir() else []


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _changes(stored: Settings, asked: Settings, place: Path) -> list[str]:
    """A line for each setting that may change and did. Raises: ConfigError for one that may not."""
    before, now = _leaves(stored), _leaves(asked)
    changes = []
    for name in [*now, *(name for name in before if name not in now)]:
        loop, _, setting = name.partition(".")
        may_change = loop == "training" and setting in _MAY_CHANGE
        newer = name not in before and now[name] in (False, 0)  # an option that came later, and is off
        if newer or before.get(name) == now.get(name):
            continue
        if not may_change:
            raise ConfigError(
                f"{place.name} was trained with {name} = {before.get(name)}, asked for {now.get(name)}: "
                "resume with the old value or start another --output"
            )
        changes.append(f"{name} was {before.get(name)}, is {now.get(name)} now")
    return changes


def _leaves(settings: Settings, prefix: str = "") -> dict[str, object]:
    """Nested settings by dotted names, as JSON gives them back."""
    found: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= _leaves(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = list(value) if isinstance(value, tuple) else value
    return found


def _flat(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, values in state.items() for name, value in values.items()
    }


def _restore(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    full = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": full["param_groups"]})
