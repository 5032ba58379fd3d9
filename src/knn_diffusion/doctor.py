"""What is installed, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from knn_diffusion.errors import KnnDiffusionError

Status = Literal["ok", "optional", "wrong"]
"""`optional`: the package works without it, one command does not; `wrong`: something needed is missing or damaged."""


INSTALL_AGAIN = "install the package again: pip install --force-reinstall knn-diffusion"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing looked at: what was found, and how to mend it where that is needed."""

    name: str
    status: Status
    found: str
    cure: str = ""


def examine() -> list[Finding]:
    """Look at Python, packages, device, font and the bundled models; changes nothing, needs no network."""
    return [_python(), *_packages(), _device(), _font(), *_bundles()]


def report(findings: list[Finding]) -> dict[str, Any]:
    """The findings as plain values; `ok` is False when something needed is missing or damaged."""
    return {
        "ok": all(finding.status != "wrong" for finding in findings),
        "findings": [asdict(finding) for finding in findings],
    }


def _python() -> Finding:
    fine = sys.version_info >= (3, 11)
    cure = "" if fine else "install Python 3.11 or newer and make a new venv with it"
    return Finding(name="python", status="ok" if fine else "wrong", found=platform.python_version(), cure=cure)


def _packages() -> Iterator[Finding]:
    """Every requirement this installation declares; those of an extra are optional."""
    try:
        declared = importlib.metadata.requires("knn-diffusion") or []
    except importlib.metadata.PackageNotFoundError:
        cure = "pip install -e . in the project's folder"
        yield Finding(name="knn-diffusion", status="optional", found="runs from its source", cure=cure)
        return
    for line in declared:
        name, _, condition = line.partition(";")
        extra = re.search(r"extra == ['\"](\w+)['\"]", condition)
        if not name.startswith("knn-diffusion") and not (extra and extra[1] in ("dev", "all")):
            yield _package(name.replace(" ", ""), extra[1] if extra else None)


def _package(requirement: str, extra: str | None) -> Finding:
    name, bounds = (
        re.split(r"(?=[<>=!~])", requirement, maxsplit=1) if re.search("[<>=!~]", requirement) else (requirement, "")
    )
    cure = f"pip install 'knn-diffusion[{extra}]'" if extra else f"pip install '{requirement}'"
    name = name.partition("[")[0]
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(name=name, status="optional" if extra else "wrong", found="not installed", cure=cure)
    if not within(version, bounds):
        return Finding(name=name, status="wrong", found=f"{version}, expected {bounds}", cure=cure)
    return Finding(name=name, status="ok", found=version)


def within(version: str, bounds: str) -> bool:
    """Whether a version lies in bounds such as ">=2.10,<2.14"; only these two comparisons are looked at."""
    known = _release(version)
    for bound in bounds.split(","):
        if bound.startswith(">=") and known < _release(bound[2:]):
            return False
        if bound.startswith("<") and not bound.startswith("<=") and known >= _release(bound[1:]):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    numbers = tuple(int(number) for number in re.match(r"[\d.]*", version)[0].strip(".").split(".") if number)  # type: ignore[index]
    return numbers + (0,) * (4 - len(numbers))


def _device() -> Finding:
    import torch

    from knn_diffusion.device import choose_device, choose_dtype

    device = choose_device()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    dtype = str(choose_dtype(device)).removeprefix("torch.")
    return Finding(name="device", status="ok", found=f"{name}, draws in {dtype}")


def _font() -> Finding:
    from knn_diffusion.stickers.glyphs import find_font

    try:
        return Finding(name="emoji font", status="ok", found=str(find_font()))
    except KnnDiffusionError as error:
        return Finding(name="emoji font", status="optional", found="not found", cure=str(error))


def _bundles() -> Iterator[Finding]:
    from knn_diffusion.model_folder import bundled_models

    if not bundled_models():
        yield Finding(name="bundled model", status="wrong", found="none", cure=INSTALL_AGAIN)
    for name in bundled_models():
        yield _bundle(name)


def _bundle(name: str) -> Finding:
    from knn_diffusion.pipeline import KnnDiffusion

    try:
        index = KnnDiffusion.from_pretrained(name).index
    except KnnDiffusionError as error:
        return Finding(name=f"model {name}", status="wrong", found=str(error), cure=INSTALL_AGAIN)
    return Finding(name=f"model {name}", status="ok", found=f"every part is sound; {len(index):,} images in its index")
