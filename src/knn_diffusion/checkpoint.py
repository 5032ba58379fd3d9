"""Weights and configurations on disk: written atomically, verified when read, never pickled.

A part folder holds `config.json` (format, kind, configuration, digest of the weights, facts) and `model.safetensors`.
No weight format of the field carries a checksum: one flipped bit loads silently. So the digest is ours.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from knn_diffusion.config import from_dict, read_mapping, to_dict
from knn_diffusion.errors import CheckpointError, ConfigError, KnnDiffusionError

FORMAT_VERSION = 1
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TEMPORARY = ".writing-"
"""How the names begin of what is being written; one that a killed process left may be deleted."""

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedPart(Generic[ConfigT]):
    """One verified part of a model: its configuration, its weights, and facts stored beside them."""

    config: ConfigT
    weights: dict[str, Tensor]
    extra: dict[str, Any]


def save_part(
    folder: Path, *, kind: str, config: object, weights: Mapping[str, Tensor], extra: Mapping[str, Any] | None = None
) -> None:
    """Write a part folder in one step: after a crash either the old part or the new one is there.

    Args:
        kind: what the part is, such as "denoiser"; reading it as another kind is an error.
        extra: JSON facts to keep beside the weights (steps trained, fingerprints).

    Raises: KnnDiffusionError when the disk is full or not writable; what was there stays.
    """
    with atomic_folder(folder) as temporary:
        save_weights(temporary / WEIGHTS_FILE, weights)
        facts = {
            "format_version": FORMAT_VERSION,
            "kind": kind,
            "config": to_dict(config),
            "weights_sha256": file_digest(temporary / WEIGHTS_FILE),
            "extra": dict(extra or {}),
        }
        write_json(temporary / CONFIG_FILE, facts)


def load_part(folder: Path, *, kind: str, config_class: type[ConfigT]) -> LoadedPart[ConfigT]:
    """Read and verify a part folder.

    Raises: CheckpointError when it is missing, damaged, of another kind or of a newer format.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise CheckpointError(f"expected a {kind} in {folder}, found no {CONFIG_FILE}: check the path or train one")
    facts = read_facts(folder / CONFIG_FILE)
    if facts.get("kind") != kind:
        raise CheckpointError(
            f"expected a {kind} in {folder}, found a {facts.get('kind')}: name the folder of a {kind}"
        )
    if facts.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format {facts.get('format_version')}, this version reads {FORMAT_VERSION}: upgrade knn-diffusion"
        )
    config = stored_config(config_class, facts.get("config"), folder / CONFIG_FILE)
    weights = load_weights_file(folder / WEIGHTS_FILE, str(facts.get("weights_sha256")))
    return LoadedPart(config=config, weights=weights, extra=dict(facts.get("extra", {})))


def read_facts(path: Path) -> dict[str, Any]:
    """The mapping in a file beside weights.

    Raises: CheckpointError when it is missing or does not parse.
    """
    try:
        return read_mapping(path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def stored_config(config_class: type[ConfigT], values: object, path: Path) -> ConfigT:
    """The configuration stored in a file beside weights.

    Raises: CheckpointError when it is damaged or of a version with other fields.
    """
    try:
        return from_dict(config_class, values, source=str(path))
    except ConfigError as error:
        raise CheckpointError(
            f"expected a configuration that this version reads, got {error}: copy the folder again, or use the version "
            "that wrote it"
        ) from None


def load_weights_file(path: Path, expected_sha256: str | None) -> dict[str, Tensor]:
    """Tensors of a safetensors file whose bytes have the expected digest (None: not known).

    Raises: CheckpointError when the file is missing, short, or not the one that was written.
    """
    if not path.is_file():
        raise CheckpointError(f"expected weights at {path}, found none: copy the whole model folder again")
    if expected_sha256 is not None and file_digest(path) != expected_sha256:
        raise CheckpointError(
            f"{path} is damaged (its digest is not the one stored with it): copy or download it again"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file ({error}): copy or download it again"
        ) from None


def apply_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights into a module, every name and shape accounted for.

    Raises: CheckpointError naming the first missing, unexpected or differently shaped tensor.
    """
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{source}: {len(missing)} tensors missing (first: {next(iter(missing), 'none')}), "
            f"{len(unexpected)} unexpected (first: {next(iter(unexpected), 'none')}): the weights are of another model"
        )
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise CheckpointError(
                f"{source}: expected {name} of shape {tuple(tensor.shape)}, got {tuple(weights[name].shape)}: "
                "the weights are of another size"
            )
    module.load_state_dict(dict(weights))


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write tensors as safetensors, on the disk when this returns."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    try:
        save_file(plain, path)
        path.chmod(0o644)
        _sync(path)
    except (SafetensorError, OSError) as error:
        raise _write_error(path, error) from None


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically, keys as given; in file names that are no UTF-8 the bytes become JSON escapes."""
    atomic_write_bytes(
        path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
    )


def atomic_write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves the old content or the new, never a part.

    Raises: KnnDiffusionError when the disk is full or not writable.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)


def write_new_bytes(path: Path, content: bytes) -> bool:
    """Write a file whole under a name that is free; False where the name is taken, by this process or another.

    Raises: KnnDiffusionError when the disk is full or not writable; then the name is free again.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
    except FileExistsError:
        return False
    except OSError as error:
        raise _write_error(path, error) from None
    try:
        atomic_write_bytes(path, content)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return True


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` for others to write, which takes its place when the block ends without an error.

    Raises: KnnDiffusionError when the disk is full or not writable.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise _write_error(path, error) from None
    temporary = Path(name)
    try:
        yield temporary
        _sync(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _write_error(path, error) from None
        raise


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary sibling to fill, which takes the place of `folder` when the block ends without an error.

    Raises: KnnDiffusionError when the disk is full or not writable; the old folder stays.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder.parent))
    except OSError as error:
        raise _write_error(folder, error) from None
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        _sync(temporary)
        _swap(temporary, folder)
        _sync(folder.parent)
    except OSError as error:
        raise _write_error(folder, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes, types and values, the same whatever file they lie in."""
    total = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return total.hexdigest()


def _swap(temporary: Path, folder: Path) -> None:
    """Rename over an existing folder by way of a second temporary name; a failure puts the old one back."""
    if not folder.exists():
        os.replace(temporary, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=folder.parent)) / "old"
    os.replace(folder, old)
    try:
        os.replace(temporary, folder)
    except OSError:
        os.replace(old, folder)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_error(path: Path, error: Exception) -> KnnDiffusionError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    reason = "the disk is full" if full else getattr(error, "strerror", None) or str(error)
    return KnnDiffusionError(
        f"{path} could not be written ({reason}): free space or choose another place; nothing was changed"
    )
