"""The benchmark of training runs in a size for tests, and counts what it says it counts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import training
import training_memory
from speed.ours import SIZES


def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, float]:
    asked = ["--size", "tiny", "--batch", "4", "--steps", "2", "--items", "50", "--device", "cpu", "--json"]
    monkeypatch.setattr(sys, "argv", ["training.py", *asked, "--set", "precision=float32", *arguments])
    training.main()
    return json.loads(capsys.readouterr().out)


def test_a_step_is_measured_forwards_and_backwards(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(monkeypatch, capsys)
    config, pairs = SIZES["tiny"], 4 * 11
    linear = config.depth * 2 * 12 * config.width**2 + 2 * config.width * config.vocab_size
    self_attention, cross_attention = (config.depth * 2 * 2 * keys * config.width for keys in (config.places, pairs))
    # Backwards there are two products for each, and self-attention makes its scores again.
    products = config.places * (3 * linear + 3.5 * self_attention + 3 * cross_attention)
    assert products < found["operations_per_image"] < 1.1 * products  # the rest is what the condition and the step cost
    assert 0 < found["share_of_matmul_rate"] < 1
    assert 0 < found["share_waiting_for_data"] < 1
    assert found["images_per_second"] == pytest.approx(4 / found["seconds_per_step"], rel=0.01)
    days = 70e6 / found["images_per_second"] / 86_400
    assert found["days_for_70_million_images"] == pytest.approx(days, rel=0.01)


def test_what_is_computed_again_counts(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plain = report(monkeypatch, capsys)["operations_per_image"]
    again = report(monkeypatch, capsys, "--set", "activation_checkpointing=true")["operations_per_image"]
    assert 1.1 < again / plain < 1.4


def test_the_memory_of_the_papers_size_is_what_the_documentation_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["training_memory.py"])
    training_memory.main()
    documented = (Path(__file__).parents[1] / "docs" / "training.md").read_text()
    assert capsys.readouterr().out in documented
