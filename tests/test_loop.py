"""The training loop on a toy: order, resume, interruption, logs."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from knn_diffusion.checkpoint import save_part
from knn_diffusion.config import config
from knn_diffusion.errors import CheckpointError, ConfigError, TrainingError, UsageError
from knn_diffusion.training import loop
from knn_diffusion.training.ahead import Ahead
from knn_diffusion.training.loop import TrainingResult
from knn_diffusion.training.objective import Phase, Validation
from knn_diffusion.training.options import RunOptions, StepProgress
from knn_diffusion.training.plan import TrainingConfig, batch_indices, learning_rate


@config
class LineConfig:
    width: int = 3


class Line:
    """Fits y = x · w with noise drawn from the step's generator, and a second phase to stand for a discriminator."""

    def __init__(self, poison_at: int | None = None) -> None:
        torch.manual_seed(7)
        self.network: nn.Module = nn.Linear(3, 1)
        self.other = nn.Linear(1, 1)
        self.modules: nn.Module = nn.ModuleDict({"network": self.network, "other": self.other})
        self.poison_at = poison_at
        self.settings: dict[str, object] = {"loss": {"weight": 1.0, "betas": (0.5, 0.9)}}

    def phases(self) -> list[Phase]:
        return [
            Phase("fit", list(self.network.parameters()), self._fit),
            Phase("judge", list(self.other.parameters()), self._judge, 0.5),
        ]

    def _fit(self, batch: Mapping[str, Tensor], step: int, generator: torch.Generator) -> dict[str, Tensor]:
        noise = torch.randn(batch["x"].shape, generator=generator)
        loss = (self.network(batch["x"] + 0.1 * noise) - batch["y"]).square().mean()
        return {"loss": loss * float("nan") if step == self.poison_at else loss}

    def _judge(self, batch: Mapping[str, Tensor], step: int, generator: torch.Generator) -> dict[str, Tensor] | None:
        return None if step < 3 else {"loss": self.other(batch["y"]).square().mean()}

    def validate(self, network: nn.Module, step: int, generator: torch.Generator) -> Validation:
        return Validation(metrics={"weight": float(network.weight.sum())})

    def export(self, network: nn.Module, folder: Path, facts: Mapping[str, object]) -> None:
        save_part(folder, kind="line", config=LineConfig(), weights=network.state_dict(), extra=facts)


class Points:
    truth: ClassVar = torch.tensor([1.0, -2.0, 3.0])

    def __init__(self, count: int = 20) -> None:
        self.x = torch.randn(count, 3, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x = self.x[indices] + 0.01 * torch.randn(len(indices), 3, generator=generator)
        return {"x": x, "y": (x @ self.truth)[:, None]}


def settings(**changes: object) -> TrainingConfig:
    values = {"num_steps": 12, "batch_size": 4, "learning_rate": 0.05, "warmup_steps": 3, "precision": "float32"}
    return TrainingConfig(**{**values, "validate_every": 6, "checkpoint_every": 4, "log_every": 1, **changes})


def train(line: Line, points: Points, config: TrainingConfig, output: Path, **options: Any) -> TrainingResult:
    return loop.train(line, points, config, RunOptions(output=output, **{"device": "cpu", **options}))


def state(line: Line) -> list[Tensor]:
    return [value.clone() for value in line.modules.state_dict().values()]


def test_a_resumed_run_equals_the_run_that_never_stopped(tmp_path: Path) -> None:
    whole = Line()
    train(whole, Points(), settings(), tmp_path / "whole")
    stop_after(5, Line(), tmp_path / "parts")
    resumed = Line()
    result = train(resumed, Points(), settings(), tmp_path / "parts", resume=True)
    assert result.finished
    assert all(torch.equal(a, b) for a, b in zip(state(whole), state(resumed), strict=True))
    exported = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert exported[0] == exported[1]
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    without_time = [
        [{k: v for k, v in json.loads(line).items() if not k.startswith("minutes")} for line in log] for log in logs
    ]
    assert without_time[0] == without_time[1]


def stop_after(step: int, line: Line, output: Path) -> None:
    def press_ctrl_c(progress: StepProgress) -> None:
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(line, Points(), settings(), output, watch=press_ctrl_c)


def test_an_interrupted_run_leaves_a_checkpoint_of_a_whole_step(tmp_path: Path) -> None:
    stop_after(5, Line(), tmp_path)
    newest = max((tmp_path / "checkpoints").iterdir())
    assert newest.name in {"step-00000005", "step-00000006"}


def test_time_slices_stop_early_and_say_so(tmp_path: Path) -> None:
    result = train(Line(), Points(), settings(), tmp_path, max_minutes=0.0)
    assert (result.step, result.finished) == (1, False)


def test_a_second_run_never_overwrites_the_first(tmp_path: Path) -> None:
    train(Line(), Points(), settings(), tmp_path, max_minutes=0.0)
    with pytest.raises(UsageError, match="already holds a run .* add --resume"):
        train(Line(), Points(), settings(), tmp_path)
    with pytest.raises(UsageError, match="expected a folder for --output, .* is a file"):
        train(Line(), Points(), settings(), tmp_path / "metrics.jsonl")


def test_resuming_with_another_batch_size_is_refused_and_a_longer_run_is_not(tmp_path: Path) -> None:
    train(Line(), Points(), settings(num_steps=2), tmp_path)
    with pytest.raises(ConfigError, match="training.batch_size = 4, asked for 5"):
        train(Line(), Points(), settings(batch_size=5), tmp_path, resume=True)
    said: list[str] = []
    longer = settings(num_steps=3, log_every=2)
    assert train(Line(), Points(), longer, tmp_path, resume=True, notice=said.append).step == 3
    assert said == ["training.num_steps was 2, is 3 now", "training.log_every was 1, is 2 now"]


def test_a_complete_run_says_so(tmp_path: Path) -> None:
    train(Line(), Points(), settings(num_steps=3), tmp_path)
    with pytest.raises(UsageError, match=r"holds a complete run \(step 3 of 3\), its model lies in .*model: choose"):
        train(Line(), Points(), settings(num_steps=2), tmp_path)
    assert train(Line(), Points(), settings(num_steps=2), tmp_path, resume=True).finished


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"loss": {"weight": 2.0, "betas": (0.5, 0.9)}}, "loss.weight = 1.0, asked for 2.0: resume with the old"),
        ({"loss": {"weight": 1.0}}, "loss.betas = .*, asked for None"),
        ({"loss": {"weight": 1.0, "betas": (0.5, 0.9)}, "k": 3}, "k = None, asked for 3"),
    ],
)
def test_resuming_with_another_objective_is_refused(asked: dict[str, object], message: str, tmp_path: Path) -> None:
    train(Line(), Points(), settings(num_steps=2), tmp_path)
    other = Line()
    other.settings = asked
    with pytest.raises(ConfigError, match=message):
        train(other, Points(), settings(num_steps=3), tmp_path, resume=True)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    train(Line(), Points(), settings(), tmp_path)
    newest = max((tmp_path / "checkpoints").iterdir())
    damage(newest / "state.safetensors")
    resumed = Line()
    assert train(resumed, Points(), settings(), tmp_path, resume=True).finished
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        damage(checkpoint / "state.safetensors")
    with pytest.raises(CheckpointError, match="no checkpoint under .* is sound"):
        train(Line(), Points(), settings(), tmp_path, resume=True)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_checkpoint_of_another_version_is_said_to_be_one(tmp_path: Path) -> None:
    train(Line(), Points(), settings(num_steps=2), tmp_path)
    facts = tmp_path / "checkpoints" / "step-00000002" / "state.json"
    facts.write_text(facts.read_text().replace('"settings"', '"config"'))
    with pytest.raises(CheckpointError, match="written by another version of this package, it lacks 'settings'"):
        train(Line(), Points(), settings(num_steps=3), tmp_path, resume=True)


def test_a_run_from_before_an_option_goes_on_while_the_option_is_off(tmp_path: Path) -> None:
    train(Line(), Points(), settings(num_steps=2), tmp_path)

    class Newer(Line):
        def __init__(self, option: object) -> None:
            super().__init__()
            self.settings = {**self.settings, "network": {"option": option}}

    with pytest.raises(ConfigError, match="network.option = None, asked for True"):
        train(Newer(True), Points(), settings(), tmp_path, resume=True)
    assert train(Newer(False), Points(), settings(num_steps=3), tmp_path, resume=True).step == 3


def test_only_the_last_two_checkpoints_are_kept(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / ".writing-killed").mkdir(parents=True)
    train(Line(), Points(), settings(), tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000008", "step-00000012"]


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(tmp_path: Path) -> None:
    line = Line(poison_at=5)
    with pytest.raises(TrainingError, match="loss is nan .* at step 5"):
        train(line, Points(), settings(), tmp_path)
    assert all(torch.isfinite(value).all() for value in state(line))


def test_every_pass_sees_every_example_once() -> None:
    drawn = torch.cat([batch_indices(10, 4, step, seed=3) for step in range(1, 6)])
    assert sorted(drawn[:10].tolist()) == list(range(10))
    assert sorted(drawn[10:].tolist()) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()


def test_the_learning_rate_warms_up_and_falls_to_its_end() -> None:
    c = settings(num_steps=100, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1)
    rates = [learning_rate(c, step) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))


def test_without_warm_up_the_first_step_is_already_at_the_peak(tmp_path: Path) -> None:
    c = settings(num_steps=4, warmup_steps=0, learning_rate=1.0)
    assert learning_rate(c, 0) == 1.0
    assert 0.8 < learning_rate(c, 1) < 1.0
    assert train(Line(), Points(), settings(num_steps=1, warmup_steps=0), tmp_path).finished


def test_moment_decays_outside_0_to_1_are_refused() -> None:
    with pytest.raises(ConfigError, match="betas must be two numbers in"):
        settings(betas=(0.9, 1.0))


def test_a_log_line_cut_short_by_a_crash_does_not_stop_the_resume(tmp_path: Path) -> None:
    train(Line(), Points(), settings(num_steps=2), tmp_path)
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as log:
        log.write('{"step": 3, "minu')
    assert train(Line(), Points(), settings(num_steps=3), tmp_path, resume=True).step == 3
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 2, 3, 3]  # a validation is a line of its own


def test_the_toy_is_learned(tmp_path: Path) -> None:
    line = Line()
    train(
        line,
        Points(64),
        settings(num_steps=200, batch_size=16, ema_decay=0.9, weight_decay=0.0),
        tmp_path,
    )
    assert torch.allclose(line.network.weight[0], Points.truth, atol=0.3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_steps", 0),
        ("ema_decay", 1.0),
        ("learning_rate", 0.0),
        ("warmup_steps", -1),
        ("final_learning_rate", -0.1),
        ("weight_decay", -0.1),
    ],
)
def test_impossible_settings_name_field_value_and_rule(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be .*, got {value}"):
        settings(**{field: value})


def test_the_next_batch_is_gathered_while_this_one_is_learned_from() -> None:
    begun, asked = [threading.Event() for _ in range(4)], list[int]()

    def gather(step: int) -> dict[str, Tensor]:
        asked.append(step)
        begun[step].set()
        return {"step": torch.tensor(step)}

    with Ahead(gather, last=3) as ahead:
        assert int(ahead.take(1)["step"]) == 1
        assert begun[2].wait(10)  # without being taken
        assert not begun[3].is_set()
        assert [int(ahead.take(step)["step"]) for step in (2, 3)] == [2, 3]
    assert asked == [1, 2, 3]


def test_another_step_than_the_next_is_gathered_anew_and_an_error_reaches_who_takes_the_batch() -> None:
    def gather(step: int) -> dict[str, Tensor]:
        if step == 5:
            raise TrainingError("damaged")
        return {"step": torch.tensor(step)}

    with Ahead(gather, last=9) as ahead:
        ahead.take(1)
        assert int(ahead.take(4)["step"]) == 4
        with pytest.raises(TrainingError, match="damaged"):
            ahead.take(5)
        assert int(ahead.take(6)["step"]) == 6


def test_the_log_tells_how_long_the_run_has_waited_for_its_data(tmp_path: Path) -> None:
    class Slow(Points):
        def batch(self, indices: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
            time.sleep(0.2)
            return super().batch(indices, generator)

    train(Line(), Slow(), settings(num_steps=3), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    waited = [line["minutes_waited"] for line in lines if "minutes" in line]
    assert waited == sorted(waited)
    assert 0.5 / 60 <= waited[-1] <= lines[-2]["minutes"] + 0.001


def test_muon_needs_matrices_between_hidden_layers_and_whole_ones(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="weight matrices between hidden layers for Muon, the fit names none: leave out"
    ):
        train(Line(), Points(), settings(optimizer="muon"), tmp_path)
    with pytest.raises(ConfigError, match="optimizer must be adamw with fsdp: Muon needs whole matrices, got 'muon'"):
        settings(optimizer="muon", parallel="fsdp")
