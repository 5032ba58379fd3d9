"""What is computed where: bfloat16 only where the hardware has it, and a line when a GPU's memory runs out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ImageFile
from tiny_world import build_model, draw_pictures

from knn_diffusion import ImageIndex, KnnDiffusion, pipeline
from knn_diffusion.cli import main
from knn_diffusion.device import binary_size, choose_device, choose_dtype, computes_bfloat16, own_defaults
from knn_diffusion.errors import ImageError, KnnDiffusionError, UsageError
from knn_diffusion.images import open_image


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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("world")
    pictures = draw_pictures(place / "pictures")
    return build_model(place / "model", pictures), pictures


@contextmanager
def another_library(setting: str) -> Iterator[None]:
    """One that has set torch's or Pillow's defaults for itself."""
    try:
        if setting == "truncated":
            ImageFile.LOAD_TRUNCATED_IMAGES = True
        elif setting == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(getattr(torch, setting))
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        ImageFile.LOAD_TRUNCATED_IMAGES = False


@pytest.mark.parametrize("setting", ["float64", "bfloat16", "meta"])
def test_defaults_of_another_library_do_not_reach_in(setting: str, model: tuple[Path, Path], tmp_path: Path) -> None:
    folder, pictures = model

    def use(place: Path) -> tuple[list[Any], ...]:
        pipe = KnnDiffusion.from_pretrained(folder, device="cpu")
        drawn = pipe("a red heart", num_inference_steps=2, sampler="confidence", guidance_scale=2.0).images
        edited = pipe.edit(pictures / "red-bar.png", "a red heart", 0.5, num_inference_steps=2).images
        with ImageIndex.build([pictures], place, folder / "encoder") as index:
            found = index.search_text("a red heart", 3)
            copies = index.dedup(threshold=0.5, manhattan=255.0).num_copies
            table = index.frozen().self_neighbors(2).tolist()
            return [one.tobytes() for one in (*drawn, *edited)], found.ids, index.embeddings.tolist(), [copies], table

    expected = use(tmp_path / "before")
    with another_library(setting):
        dtype, device = torch.get_default_dtype(), torch.get_default_device()
        assert use(tmp_path / "after") == expected
        assert (torch.get_default_dtype(), torch.get_default_device()) == (dtype, device), "and they stay as they were"


def test_truncated_files_are_refused_whatever_pillow_is_set_to(model: tuple[Path, Path]) -> None:
    whole = sorted(model[1].glob("*.png"))[0].read_bytes()
    with another_library("truncated"):
        with pytest.raises(ImageError, match="expected a whole image"):
            open_image(whole[: len(whole) // 2])
        assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_own_defaults_hold_until_the_last_thread_has_left_them() -> None:
    entered, leave = threading.Event(), threading.Event()

    def stay() -> torch.dtype:
        with own_defaults():
            entered.set()
            assert leave.wait(30)
            return torch.get_default_dtype()

    with another_library("float64"), ThreadPoolExecutor(1) as pool:
        staying = pool.submit(stay)
        assert entered.wait(30)
        with own_defaults():
            pass
        leave.set()
        assert staying.result(30) == torch.float32
        assert torch.get_default_dtype() == torch.float64


@pytest.mark.parametrize("name", ["nowhere", "cuda:99", 99, -1, ""])
def test_a_device_that_is_not_here_is_refused_whatever_names_it(name: str | int) -> None:
    with pytest.raises(
        UsageError, match=r"expected a device that is here \(auto, cpu, cuda, mps\), got .*: use --device auto"
    ):
        choose_device(name)
    assert choose_device(torch.device("cpu")) == torch.device("cpu")
