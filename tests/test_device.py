"""What is computed where: bfloat16 only where the hardware has it, and a line when a GPU's memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_world import build_model, draw_pictures

from knn_diffusion import KnnDiffusion, pipeline
from knn_diffusion.cli import main
from knn_diffusion.device import binary_size, choose_dtype, computes_bfloat16
from knn_diffusion.errors import KnnDiffusionError, UsageError


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


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> KnnDiffusion:
    place = tmp_path_factory.mktemp("model")
    return KnnDiffusion.from_pretrained(build_model(place / "tiny", draw_pictures(place / "pictures")), device="cpu")


def full(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("draw", [lambda pipe: pipe("a cat"), lambda pipe: pipe.edit(pipe("a cat").images[0], "a dog")])
@pytest.mark.parametrize("part", ["sample", "uint8_from_pixels"])
def test_memory_that_runs_out_while_drawing_is_a_line_with_what_needs_less(
    pipe: KnnDiffusion, draw: Callable[[KnnDiffusion], Any], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, part, full)
    monkeypatch.setattr(pipeline, "computes_bfloat16", lambda device: True)
    monkeypatch.setattr(pipe, "dtype", torch.float32)
    monkeypatch.setattr(pipe, "micro_batch", 8)
    with pytest.raises(KnnDiffusionError) as raised:
        draw(pipe)
    assert str(raised.value) == (
        "memory ran out on cpu while drawing 8 images at once in float32: free it of other programs, or compute on "
        '--device cpu, or in Python set pipe.micro_batch = 4 or ask for dtype="bfloat16"'
    )


def test_a_model_that_does_not_fit_is_a_line_with_its_size(pipe: KnnDiffusion, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(
        KnnDiffusionError, match=r"expected \d+ MiB of memory on cpu for the denoiser in bfloat16, and "
    ):
        KnnDiffusion(pipe.model, device="cpu", dtype="bfloat16")


def test_the_command_line_says_it_whatever_ran_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(KnnDiffusion, "from_pretrained", full)
    assert main(["generate", "a cat"]) == 1
    assert capsys.readouterr().err == (
        "error: memory ran out on the GPU: free it of other programs, or compute on --device cpu\n"
    )


def test_sizes_are_said_in_binary_units() -> None:
    assert [binary_size(size) for size in (0, 5 << 20, 1 << 30, 3 << 29)] == ["0 MiB", "5 MiB", "1.0 GiB", "1.5 GiB"]
