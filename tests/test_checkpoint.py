"""Parts on disk: round trips, damage, full disks."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from knn_diffusion import checkpoint
from knn_diffusion.checkpoint import apply_weights, atomic_write_bytes, load_part, save_part, weights_digest
from knn_diffusion.config import config
from knn_diffusion.errors import CheckpointError, KnnDiffusionError


@config
class Small:
    width: int


def save(folder: Path, value: float = 1.0) -> None:
    weights = {"a": torch.full((3,), value), "b": torch.arange(4, dtype=torch.float16)}
    save_part(folder, kind="toy", config=Small(width=3), weights=weights, extra={"steps": 5})


def test_a_part_comes_back_as_it_was(tmp_path: Path) -> None:
    save(tmp_path / "part")
    part = load_part(tmp_path / "part", kind="toy", config_class=Small)
    assert part.config == Small(width=3)
    assert part.extra == {"steps": 5}
    assert part.weights["b"].dtype == torch.float16
    assert torch.equal(part.weights["a"], torch.ones(3))


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged .* copy or download it again"):
        load_part(tmp_path, kind="toy", config_class=Small)


def test_missing_and_foreign_parts_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"expected a toy in .*, found no config.json"):
        load_part(tmp_path / "nothing", kind="toy", config_class=Small)
    save(tmp_path / "part")
    with pytest.raises(CheckpointError, match="expected a denoiser in .*, found a toy"):
        load_part(tmp_path / "part", kind="denoiser", config_class=Small)
    (tmp_path / "part" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="expected weights at .*, found none"):
        load_part(tmp_path / "part", kind="toy", config_class=Small)


def test_an_unknown_key_in_a_configuration_is_an_error(tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"width": 3', '"width": 3, "wdth": 4'))
    with pytest.raises(CheckpointError, match="wdth: .* use the version that wrote it"):
        load_part(tmp_path, kind="toy", config_class=Small)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"\xff",
        b'{"kind": "toy", "format_version": 1}',
        b'{"kind": "toy", "format_version": 1, "config": {"width": 3}}',
    ],
)
def test_a_damaged_description_is_a_damaged_part(tmp_path: Path, content: bytes) -> None:
    save(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError):
        load_part(tmp_path, kind="toy", config_class=Small)


def test_a_newer_format_asks_for_an_upgrade(tmp_path: Path) -> None:
    save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(CheckpointError, match="has format 2, this version reads 1: upgrade"):
        load_part(tmp_path, kind="toy", config_class=Small)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    save(tmp_path / "part", 1.0)

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, call, fail)
        with pytest.raises(KnnDiffusionError, match="could not be written .the disk is full."):
            save(tmp_path / "part", 2.0)
        with pytest.raises(KnnDiffusionError, match="could not be written"):
            atomic_write_bytes(tmp_path / "file", b"new")
    assert load_part(tmp_path / "part", kind="toy", config_class=Small).weights["a"][0] == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part"]


def test_a_crash_between_the_two_renames_puts_the_old_part_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "part", 1.0)
    real, calls = os.replace, []

    def second_fails(source: str, target: str) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", second_fails)
    with pytest.raises(KnnDiffusionError, match="Input/output error"):
        save(tmp_path / "part", 2.0)
    assert load_part(tmp_path / "part", kind="toy", config_class=Small).weights["a"][0] == 1.0


def test_weights_of_another_model_are_named() -> None:
    module = nn.Linear(2, 3)
    with pytest.raises(
        CheckpointError, match=r"here: 1 tensors missing \(first: bias\), 1 unexpected \(first: extra\)"
    ):
        apply_weights(module, {"weight": torch.zeros(3, 2), "extra": torch.zeros(1)}, "here")
    with pytest.raises(CheckpointError, match=r"expected bias of shape \(3,\), got \(4,\)"):
        apply_weights(module, {"weight": torch.zeros(3, 2), "bias": torch.zeros(4)}, "here")


def test_the_digest_sees_names_shapes_types_and_values() -> None:
    base = {"a": torch.zeros(4)}
    others = [{"b": torch.zeros(4)}, {"a": torch.zeros(2, 2)}, {"a": torch.zeros(4).half()}, {"a": torch.ones(4)}]
    assert len({weights_digest(w) for w in [base, *others]}) == 5
    assert weights_digest(base) == weights_digest({"a": torch.zeros(4)})
