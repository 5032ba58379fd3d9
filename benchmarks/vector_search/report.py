"""The run as Markdown and as one JSON object, and where it was made."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("faiss-cpu", "numpy", "usearch", "lancedb")
COLUMNS = {
    "image_recall": ("image R@10", "{:.4f}"),
    "text_recall": ("text R@10", "{:.4f}"),
    "cpu_ms_single": ("CPU ms a query", "{:.3f}"),
    "cpu_ms_batch": ("… in batches", "{:.3f}"),
    "p50_ms": ("p50 ms", "{:.3f}"),
    "p99_ms": ("p99 ms", "{:.3f}"),
    "queries_per_second": ("queries/s, 1 thread", "{:,.0f}"),
    "queries_per_second_2": ("2 threads", "{:,.0f}"),
    "index_bytes_without_fixed": ("index B/vector", "{:.1f}"),
    "index_bytes": ("… whole file", "{:.1f}"),
    "own_bytes": ("own RAM B/vector", "{:.0f}"),
    "mapped_bytes": ("mapped B/vector", "{:.0f}"),
    "disk_bytes": ("disk B/vector", "{:.0f}"),
    "build_seconds": ("build s", "{:.0f}"),
}
LEGEND = """\
Recall@10 against exact search in float32; single queries and batches of the timed kind of query, one thread.
CPU ms is process time, the steadier figure on a shared machine. Index B/vector is the serialized index without what does
not grow with the vectors (centroids, rotation, codebooks), which the whole file has. Own RAM is how much the anonymous
memory of a fresh process grew from before opening until after the first single queries; mapped is the same for pages of
files, which the system may take back. Disk counts the embeddings where the system keeps them. Build includes training,
on as many threads as stated above; the store, shared by all layouts, is filled before."""


def machine() -> dict[str, Any]:
    """Commit, hardware and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "commit": _commit(),
        "hardware": f"{name}, {os.cpu_count()} CPUs, {memory:.0f} GiB",
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
    } | {package: found for package in PACKAGES if (found := _version(package))}


def to_markdown(report: Mapping[str, Any]) -> str:
    """Targets first, then every row, then what else was measured."""
    parts = [f"# Image index: {report['data']['size']:,} vectors of {report['data']['dim']} numbers"]
    parts += ["\n".join(f"- {name}: {value}" for name, value in report["machine"].items())]
    parts += ["\n".join(f"- {name}: {_listed(value)}" for name, value in report["data"].items() if name != "size")]
    parts += ["\n".join(f"- training, {name}: {_listed(value)}" for name, value in report["training"].items())]
    met = {True: "met", False: "**missed**", None: "–"}
    lines = [[line["name"], line["target"], line["measured"], met[line["met"]]] for line in report["targets"]]
    parts += [
        "## Targets, against the paper's configuration in the same run",
        _table(["", "target", "measured", ""], lines),
    ]
    parts += ["## Rows", _rows(report["rows"]), LEGEND]
    for name, found in report["scenarios"].items():
        parts += [f"## {name}", _table(["", ""], [[key, _number(value)] for key, value in found.items()])]
    parts += [f"Left out: {name} ({why})." for name, why in report["left_out"].items()]
    return "\n\n".join(parts) + "\n"


def _rows(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    lines = [
        [system, label, *(form.format(row[key]) if key in row else "–" for key, (_, form) in COLUMNS.items())]
        for system, settings in rows.items()
        for label, row in settings.items()
    ]
    return _table(["system", "setting", *(title for title, _ in COLUMNS.values())], lines)


def _table(head: list[str], lines: list[list[str]]) -> str:
    marks = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, marks, *lines))


def _listed(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{name} {part}" for name, part in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)


def _number(value: Any) -> str:
    if isinstance(value, float) and abs(value) < 1_000:
        return f"{value:.4g}"
    return f"{value:,.0f}" if isinstance(value, (int, float)) else str(value)


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "none"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
