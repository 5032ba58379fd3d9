"""A report: figures with their intervals and counts, and everything needed to measure them again."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from knn_diffusion import __version__
from knn_diffusion.checkpoint import atomic_write_bytes, write_json
from knn_diffusion.evaluation.metrics import Estimate

Unit = Literal["share", "distance", "ratio"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One figure: what was measured, on which pictures, with its interval; `target` says what was hoped for."""

    measure: str
    of: str
    estimate: Estimate
    unit: Unit = "share"
    target: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """One protocol's figures; `note` says how they were taken, `details` holds the single answers."""

    name: str
    title: str
    note: str
    rows: list[Row]
    details: dict[str, Any] = field(default_factory=dict)

    def value(self, measure: str, of: str) -> float:
        """One figure by its names. Raises: KeyError when the section has none such."""
        return {(row.measure, row.of): row.estimate.value for row in self.rows}[measure, of]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Everything one evaluation found; `facts` say on what, with what and how."""

    facts: dict[str, Any]
    sections: list[Section]
    title: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"facts": self.facts, "sections": [asdict(section) for section in self.sections]}

    def to_markdown(self) -> str:
        """The page for people: one table a protocol, then the facts."""
        lines = [f"# {self.title or 'Evaluation of ' + str(self.facts.get('model', 'a model'))}", ""]
        for section in self.sections:
            lines += [f"## {section.title}", "", section.note, ""]
            if section.rows:
                lines += [
                    "| measure | of | value | 95 % interval | N | target |",
                    "| --- | --- | ---: | --- | ---: | --- |",
                ]
                lines += [_table_line(row) for row in section.rows] + [""]
        lines += ["## How this was measured", "", *(f"- {name}: {_plain(value)}" for name, value in self.facts.items())]
        return "\n".join(lines) + "\n"

    def to_table(self) -> str:
        """The figures alone, in columns for a terminal, each section under its title."""
        lines = []
        for section in self.sections:
            cells = [("", "value", "95 % interval", "N"), *(_cells(row) for row in section.rows)]
            widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
            lines += [section.title, ""]
            for first, *others in cells:
                padded = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
                lines.append("  ".join([first.ljust(widths[0]), *padded]).rstrip())
            lines += ["", section.note]
        return "\n".join(lines)

    def save(self, folder: Path) -> None:
        """Write report.json and report.md into `folder`, each whole or not at all."""
        write_json(folder / "report.json", self.to_dict())
        atomic_write_bytes(folder / "report.md", self.to_markdown().encode())


def circumstances() -> dict[str, Any]:
    """Command, commit, versions, hardware and time: what a figure must be read with."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "command": shlex.join(sys.argv),
        "commit": commit(),
        "versions": f"knn-diffusion {__version__}, torch {torch.__version__}, Python {platform.python_version()}",
        "hardware": f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; GPU: {gpu}",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    """The commit of the source tree this package runs from, with a mark when it has changes; "unknown" without git."""
    folder = Path(__file__).parent
    try:
        head = _git(folder, "rev-parse", "--short=12", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{head} with changes" if changed else head


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _table_line(row: Row) -> str:
    measure, value, interval, count = _cells(row)
    return f"| {measure} | {row.of} | {value} | {interval} | {count} | {row.target} |"


def _cells(row: Row) -> tuple[str, str, str, str]:
    e = row.estimate
    interval = f"{_figure(e.low, row.unit)} – {_figure(e.high, row.unit)}"
    return row.measure, _figure(e.value, row.unit), interval, str(e.count)


def _figure(value: float, unit: Unit) -> str:
    if unit == "share":
        return f"{100 * value:.1f} %"
    return f"{value:.3f}" if abs(value) >= 0.1 or not value else f"{value:.2g}"


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {entry}" for name, entry in value.items())
    return str(value)
