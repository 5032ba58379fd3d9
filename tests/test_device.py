"""What is computed where: bfloat16 only where the hardware has it."""

from __future__ import annotations

import pytest
import torch

from knn_diffusion.device import choose_dtype, computes_bfloat16
from knn_diffusion.errors import UsageError


def test_bfloat16_on_a_gpu_without_it_is_refused_and_auto_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    device = torch.device("cuda", 0)
    assert not computes_bfloat16(device)
    assert choose_dtype(device) == torch.float32
    with pytest.raises(
        UsageError, match=r"capability 8\.0 or higher, or a CPU\), got cuda:0 \(Tesla T4, capability 7\.5\): "
    ):
        choose_dtype(device, "bfloat16")
    with pytest.raises(UsageError, match=r"got mps: choose float32 \(--set training\.precision=float32, or dtype="):
        choose_dtype(torch.device("mps"), "bfloat16")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose_dtype(device) == choose_dtype(device, "bfloat16") == torch.bfloat16


def test_a_cpu_computes_bfloat16_when_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knn_diffusion.device.computes_bfloat16", lambda device: False)
    assert choose_dtype(torch.device("cpu"), "bfloat16") == torch.bfloat16
    assert choose_dtype(torch.device("cpu")) == torch.float32
