"""Which device to compute on, in which arithmetic, and what it says when its memory is full."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch

from knn_diffusion.errors import KnnDiffusionError, UsageError

DEVICES = ("auto", "cpu", "cuda", "mps")
BFLOAT16_CAPABILITY = (8, 0)
"""From this compute capability on a GPU multiplies bfloat16 matrices itself."""
FULL = ("out of memory", "ALLOC_FAILED")
"""What the texts of errors hold when a device, or a library on it, finds no memory."""


class _Float32:
    """A block in which new tensors are float32 whatever another library set; for any number of threads at once, as `_Quiet` is."""

    def __init__(self) -> None:
        self._lock, self._inside, self._other = threading.Lock(), 0, torch.float32

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._other = torch.get_default_dtype()
                torch.set_default_dtype(torch.float32)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.set_default_dtype(self._other)


_FLOAT32 = _Float32()


@contextmanager
def own_defaults() -> Iterator[None]:
    """A block, or a decorated function, in which torch's default dtype and device are its own ones: float32 and the CPU.

    Another library may have set others for itself, and then networks would be built of float64, and tensors meet on two devices.
    """
    elsewhere = torch.get_default_device().type != "cpu"
    with _FLOAT32, torch.device("cpu") if elsewhere else nullcontext():
        yield


def choose_device(name: str | int | torch.device = "auto") -> torch.device:
    """The named device; "auto" is the first GPU if there is one, else the CPU.

    Raises: UsageError when the named device is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        known = str(name).partition(":")[0] in DEVICES
        reason = f"{name!r} ({str(error).splitlines()[0]})" if known else repr(name)
        raise UsageError(
            f"expected a device that is here ({', '.join(DEVICES)}), got {reason}: use --device auto"
        ) from None
    return device


def computes_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bfloat16 matrices itself, so that they are faster than float32."""
    if device.type == "cuda":
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def choose_dtype(device: torch.device, precision: str = "auto") -> torch.dtype:
    """The arithmetic of matrix products: "auto" is bfloat16 where the hardware has it, else float32.

    A CPU without bfloat16 computes it all the same, slowly, for results as on another machine. A GPU without it is refused:
    there it is emulated at a fraction of float32's speed, and nobody asks for that.

    Raises: UsageError for another name, and for bfloat16 on a GPU that has it not.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if precision == "auto":
        return torch.bfloat16 if computes_bfloat16(device) else torch.float32
    if precision not in known:
        raise UsageError(f"expected precision auto, float32 or bfloat16, got {precision!r}: choose one of them")
    if precision == "bfloat16" and device.type != "cpu" and not computes_bfloat16(device):
        raise UsageError(
            f"expected a device that computes in bfloat16 (a GPU of compute capability {'.'.join(map(str, BFLOAT16_CAPABILITY))} "
            f'or higher, or a CPU), got {device_name(device)}: choose float32 (--set training.precision=float32, or dtype="float32")'
        )
    return known[precision]


def device_name(device: torch.device) -> str:
    """What people know a device by."""
    if device.type != "cuda":
        return str(device)
    major, minor = torch.cuda.get_device_capability(device)
    return f"{device} ({torch.cuda.get_device_name(device)}, capability {major}.{minor})"


def free_bytes(device: torch.device) -> int | None:
    """What new tensors of this process can take on a GPU; None elsewhere, where memory is not the device's own."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@contextmanager
def full_memory_told(tell: Callable[[], KnnDiffusionError]) -> Iterator[None]:
    """A block in which a device's memory may not suffice; then what `tell` makes is raised."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not any(sign in str(error) for sign in FULL):
            raise
        raise tell() from None


def binary_size(size: int) -> str:
    """Bytes as people compare them with a device's memory."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
