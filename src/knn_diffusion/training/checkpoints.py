"""Checkpoints of a training run: everything needed to go on exactly, in safetensors and JSON."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from knn_diffusion.checkpoint import (
    TEMPORARY,
    apply_weights,
    atomic_folder,
    file_digest,
    save_weights,
    write_json,
)
from knn_diffusion.config import read_mapping
from knn_diffusion.errors import CheckpointError, ConfigError, UsageError
from knn_diffusion.training.pieces import Pieces, file_name, open_pieces, own_pieces
from knn_diffusion.training.processes import Processes

KEPT = 2
_FACTS = "state.json"
_MAY_CHANGE = {"num_steps", "learning_rate", "final_learning_rate", "clip_norm"}
_MAY_CHANGE |= {"log_every", "validate_every", "checkpoint_every", "precision"}
_MAY_CHANGE |= {"micro_batch_size", "activation_checkpointing", "parallel", "compile"}
"""Settings of the training loop that a resumed run may ask for anew."""
Settings = Mapping[str, object]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """What a run consists of at a step, besides its settings."""

    modules: nn.Module
    average: nn.Module
    optimizers: Mapping[str, torch.optim.Optimizer]

    def tensors(self) -> dict[str, Tensor]:
        """Everything by name, as it lies in a checkpoint."""
        found = {f"modules.{name}": value for name, value in self.modules.state_dict().items()}
        found |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for phase, optimizer in self.optimizers.items():
            found |= {f"optimizer.{phase}.{name}": value for name, value in _flat(optimizer).items()}
        return found

    def take(self, pieces: Pieces, source: str) -> None:
        """Become what a checkpoint holds.

        Raises: CheckpointError when it is of another model.
        """
        for kind, module in (("modules", self.modules), ("average", self.average)):
            apply_weights(module, pieces.under(f"{kind}.", module.state_dict().get), source)
        for phase, optimizer in self.optimizers.items():
            _restore(optimizer, pieces, f"optimizer.{phase}.")


def save_checkpoint(folder: Path, *, step: int, state: RunState, settings: Settings, processes: Processes) -> None:
    """Write `step-…` atomically under `folder`; remove all but the last two, and what a killed run left half-written.

    All processes call this, and each writes what it alone holds. The folder takes its name when all are done.

    Args: settings: everything that decides the run, plain and nested; those of the loop under "training".

    Raises: KnnDiffusionError when the disk of one is full; PeerError in the others.
    """
    place = folder / f"step-{step:08d}"
    with processes.together(), ExitStack() as stack:
        with processes.together():
            made = str(stack.enter_context(atomic_folder(place))) if processes.first else ""
        temporary = Path(processes.texts(made)[0])
        tensors, digest = state.tensors(), ""
        with processes.together():
            if pieces := own_pieces(tensors, processes.first):
                _check_shared(temporary)
                name = file_name(tensors, processes.rank, processes.size)
                save_weights(temporary / name, pieces)
                digest = f"{name} {file_digest(temporary / name)}"
        digests = dict(one.split() for one in processes.texts(digest) if one)
        if processes.first:
            facts = {"step": step, "settings": settings, "processes": processes.size, "sha256": digests}
            write_json(temporary / _FACTS, facts)
    if processes.first:
        for old in [*_newest_first(folder)[KEPT:], *folder.glob(f"{TEMPORARY}*")]:
            shutil.rmtree(old, ignore_errors=True)


def _check_shared(temporary: Path) -> None:
    if not temporary.is_dir():
        raise UsageError(
            f"expected --output on a disk that all processes share, {temporary.parent} is on another in one of them: "
            "choose a folder that every machine sees"
        )


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
    state: RunState,
    settings: Settings,
    processes: Processes,
    notice: Callable[[str], None] | None = None,
) -> int:
    """Restore the newest sound checkpoint; a damaged one is passed over for the one before it.

    It may have been written by another number of processes, and spread otherwise.

    Args: notice: told a line for each setting that may change and did, and for another number of processes.

    Returns: the step it was written after.

    Raises: CheckpointError when none is sound; ConfigError when the run was started with other settings.
    """
    problems = []
    for candidate in _newest_first(folder):
        found = _problem(candidate, processes)
        if found:
            problems.append(found)
            continue
        facts = read_mapping(candidate / _FACTS)
        lines = _changes(facts["settings"], settings, candidate)
        if facts["processes"] != processes.size:
            lines.append(
                f"{candidate.name} is of {facts['processes']} processes: sums are rounded otherwise with {processes.size}"
            )
        for line in lines:
            if notice is not None:
                notice(line)
        with open_pieces([candidate / name for name in facts["sha256"]]) as pieces:
            state.take(pieces, str(candidate))
        return int(facts["step"])
    raise CheckpointError(
        f"no checkpoint under {folder} is sound ({'; '.join(problems)}): start again with another --output"
    )


def _problem(candidate: Path, processes: Processes) -> str:
    """Why a checkpoint cannot be used, empty when it can; the processes share the reading of its files."""
    try:
        facts = read_mapping(candidate / _FACTS)
        digests = sorted(facts["sha256"].items())
        _ = facts["settings"], facts["processes"], facts["step"]
        problem = next((found for name, digest in digests[processes.rank :: processes.size]
                        if (found := _damage(candidate / name, digest))), "")  # fmt: skip
    except (KeyError, AttributeError) as error:
        problem = f"{candidate} was written by another version of this package, it lacks {error}"
    except ConfigError as error:
        problem = str(error)
    return next((one for one in processes.texts(problem) if one), "")


def _damage(file: Path, digest: str) -> str:
    if not file.is_file():
        return f"{file} is missing"
    return "" if file_digest(file) == digest else f"{file} is damaged (its digest is not the one stored with it)"


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True) if folder.is_dir() else []


def _changes(stored: Settings, asked: Settings, place: Path) -> list[str]:
    """A line for each setting that may change and did. Raises: ConfigError for one that may not."""
    before, now = _leaves(stored), _leaves(asked)
    changes = []
    for name in [*now, *(name for name in before if name not in now)]:
        loop, _, setting = name.partition(".")
        may_change = loop == "training" and setting in _MAY_CHANGE
        newer = name not in before and now[name] in (False, 0, "adamw")  # an option that came later, and is off
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


def _restore(optimizer: torch.optim.Optimizer, pieces: Pieces, prefix: str) -> None:
    full = optimizer.state_dict()
    parameters = [one for group in optimizer.param_groups for one in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in pieces.under(prefix, lambda name: parameters[int(name.partition(".")[0])]).items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": full["param_groups"]})
