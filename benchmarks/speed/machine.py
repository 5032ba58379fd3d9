"""The machine: its name, how fast it multiplies matrices, and how much memory a run takes."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

SIDES = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192, 16384)}
"""Of the square matrices that are multiplied to find the rate."""


def hardware(device: torch.device) -> str:
    """The GPU, or the CPU with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model}, {os.cpu_count()} CPUs, {torch.get_num_threads()} threads"


def commit() -> str:
    """Of the package, short."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "none"


def matmul_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 0.2) -> float:
    """Operations a second (two for a product and its sum) of the best of some square matrix products."""
    best = 0.0
    for side in SIDES.get(device.type, SIDES["cpu"]):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        passes, begun = 0, time.perf_counter()
        while passes < 2 or time.perf_counter() - begun < seconds:
            started = time.perf_counter()
            torch.mm(a, b)
            synchronize(device)
            passes += 1
            if passes > 1:  # the first one warms up
                best = max(best, 2 * side**3 / (time.perf_counter() - started))
    return best


def operations(run: Callable[[], Any]) -> int:
    """What matrix products, attention and convolutions of a run compute; nothing else is counted."""
    aten = torch.ops.aten
    on_cpu = {  # which torch leaves out
        aten._scaled_dot_product_flash_attention_for_cpu: _attention_operations,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_operations,
    }
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        run()
    return counter.get_total_flops()


def _attention_operations(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(q, k, v))


def _attention_backward_operations(
    gradient: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any
) -> int:
    return int(sdpa_backward_flop_count(gradient, q, k, v))  # the scores again, then two products for each


def synchronize(device: torch.device) -> None:
    """Wait for what was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory so far: of the GPU's tensors, or of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def fastest(runs: dict[str, Callable[[int], Any]], repeats: int) -> dict[str, float]:
    """Seconds of the fastest run of each, taken in turns after one warm-up: a shared machine only ever adds time."""
    seconds = dict.fromkeys(runs, float("inf"))
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run(repeat)
            if repeat > 0:
                seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds
