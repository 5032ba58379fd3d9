"""The benchmark of drawing runs in a size for tests, and counts what it says it counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import sampling
import torch
from speed.machine import matmul_rate, operations
from speed.ours import SIZES, Draw, our_run

from knn_diffusion.diffusion.compiled import CompiledStep


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["sampling.py", "--size", "tiny", "--repeats", "1", "--device", "cpu", *arguments])
    sampling.main()


def test_both_systems_are_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("diffusers")
    run(monkeypatch, "--steps", "2", "--batch", "2", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["ratio"] == pytest.approx(2 * report["peer_seconds"] / report["ours_seconds"], rel=0.02)
    assert not report["compiled"]
    assert 0 < report["our_share_of_matmul_rate"] < 1
    assert report["our_peak_mib"] > 0
    assert report["our_decoder_seconds_per_image"] > 0
    assert (report["steps"], report["batch"], report["slots"]) == (2, 2, 11)


def test_a_compiled_pass_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], unchecked_shapes: None
) -> None:
    """Only traced here; what that takes is not in the time of a run."""
    monkeypatch.setattr(sampling, "CompiledStep", lambda device: CompiledStep(device, backend="eager"))
    monkeypatch.setattr(sampling, "compared", lambda *_: {"ours": 1.0, "peer": 2.0})
    run(monkeypatch, "--steps", "2", "--compile", "--json")
    report = json.loads(capsys.readouterr().out)
    assert report["compiled"]
    assert report["our_first_run_extra_seconds"] > report["our_seconds_per_image"] > 0


def test_a_sweep_is_printed_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sampling, "SWEPT", {"steps": (1, 2), "batch": (2,), "tokens": (16,), "neighbors": (0,)})
    run(monkeypatch, "--steps", "1", "--sweep", "--plot", str(tmp_path / "cost.png"))
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed[1:6]] == [
        ["steps", "1"],
        ["steps", "2"],
        ["batch", "2"],
        ["tokens", "16"],
        ["neighbors", "0"],
    ]
    assert (tmp_path / "cost.png").stat().st_size > 1000


def test_operations_are_those_of_the_matrix_products() -> None:
    """By hand, two for a product and its sum: what is made once an image, then a pass over both halves of guidance."""
    config, slots, steps = SIZES["tiny"], 4, 3
    width, places, dim, pairs = config.width, config.places, config.condition_dim, config.heads * slots
    once = 2 * slots * dim * dim + config.depth * (2 * slots * dim * 2 * width + 2 * 2 * slots * width * width)
    modulation = 2 * 2 * config.step_width**2 + 2 * config.step_width * config.depth * 4 * width
    block = places * (2 * 4 * width**2 + 2 * 2 * places * width + 2 * 2 * pairs * width + 2 * 2 * 4 * width**2)
    step = modulation + config.depth * block + 2 * places * width * config.vocab_size
    draw = Draw(config=config, steps=steps, neighbors=slots - 1)
    assert operations(lambda: our_run(draw, torch.device("cpu"), torch.float32)(0)) == 2 * (once + steps * step)


def test_the_rate_of_matrix_products_is_plausible() -> None:
    assert 1e8 < matmul_rate(torch.device("cpu"), torch.float32, seconds=0.01) < 1e14
