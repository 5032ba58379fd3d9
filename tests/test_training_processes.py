"""Training by several processes: 2 and 4 of them on this machine's CPU, started by torchrun as a user does."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import training_worker
from safetensors.torch import load_file
from tiny_world import build_model, draw_pictures
from torch._dynamo.testing import CompileCounterWithBackend

from knn_diffusion.compiler import compile_module
from knn_diffusion.errors import ConfigError, MissingDependencyError, PeerError, UsageError
from knn_diffusion.models.denoiser import Denoiser
from knn_diffusion.randomness import BatchGenerator, generator_for, rand, randn
from knn_diffusion.training import denoiser as training_denoiser
from knn_diffusion.training import loop
from knn_diffusion.training.parallel import check_divisible
from knn_diffusion.training.processes import Processes, joined, refuse_many

WORKER = Path(training_worker.__file__)
LAST, STOPPED = f"step-{training_worker.STEPS:08d}", f"step-{training_worker.STOP:08d}"
TOLERANCE = 1e-5
"""Relative difference of losses between numbers of processes, in float32 over the eight steps of the toy."""


def torchrun(processes: int, *arguments: str | Path, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--max-restarts", str(restarts), "--standalone", *map(str, arguments)]
    paths = [str(Path(loop.__file__).parents[2]), str(WORKER.parent)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy trained by one process, two and four, whole and with a stop, spread both ways; and five ways to fail."""
    folder = tmp_path_factory.mktemp("runs")
    alone = Processes(device=torch.device("cpu"))
    seen = training_worker.train(folder / "alone", alone)
    training_worker.made(folder / "saw-alone").joinpath("0-of-1.json").write_text(json.dumps(seen))
    two = torchrun(2, WORKER, folder, "ddp", "fsdp", "compiled", "nan", "full_disk", "uneven", "runs_out")
    assert two.returncode == 0, two.stderr
    for begun in ("begun", "begun-alone"):  # by two; four go on, then one
        shutil.copytree(folder / "fsdp-2-parts", folder / begun)
        shutil.rmtree(folder / begun / "checkpoints" / LAST)
    four = torchrun(4, WORKER, folder, "ddp", "fsdp", "goes_on", "dies")
    assert "SIGKILL" in four.stderr, four.stderr
    return folder


def saw(runs: Path, scenario: str, processes: int) -> list[dict[str, Any]]:
    """What each process saw."""
    files = [runs / f"saw-{scenario}" / f"{rank}-of-{processes}.json" for rank in range(processes)]
    return [json.loads(file.read_text()) for file in files if file.is_file()]


def logged(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("minutes")} for line in lines]


@pytest.mark.parametrize("processes", [2, 4])
def test_the_order_of_examples_is_the_same_whatever_the_number_of_processes(runs: Path, processes: int) -> None:
    (alone,) = saw(runs, "alone", 1)
    parts = [one["seen"] for one in saw(runs, "fsdp", processes)]
    assert [[*chain(*of_step)] for of_step in zip(*parts, strict=True)] == alone["seen"]


@pytest.mark.parametrize("name", ["ddp-2", "fsdp-2", "ddp-4", "fsdp-4"])
def test_a_resumed_run_equals_the_one_that_never_stopped_bit_for_bit(runs: Path, name: str) -> None:
    whole, parts = runs / name, runs / f"{name}-parts"
    assert sorted(p.name for p in (parts / "checkpoints").iterdir()) == [STOPPED, LAST]
    assert sorted(p.name for p in (whole / "checkpoints").iterdir()) == [LAST]
    written = sorted((whole / "checkpoints" / LAST).iterdir())
    assert len(written) == (int(name[-1]) if name.startswith("fsdp") else 1) + 1
    for file in [*written, whole / "model" / "average.safetensors"]:
        if file.suffix == ".safetensors":
            assert file.read_bytes() == (parts / file.relative_to(whole)).read_bytes(), file.name
    assert logged(whole) == logged(parts)


@pytest.mark.parametrize("name", ["ddp-2", "fsdp-2", "ddp-4", "fsdp-4", "begun", "compiled-ddp", "compiled-fsdp"])
def test_losses_agree_whatever_the_number_of_processes_and_however_they_are_spread(runs: Path, name: str) -> None:
    expected, got = logged(runs / "alone"), logged(runs / name)
    assert [line["step"] for line in got] == [line["step"] for line in expected]
    for one, other in zip(expected, got, strict=True):
        assert other == pytest.approx(one, rel=TOLERANCE)


def test_one_process_goes_on_from_shards(runs: Path) -> None:
    found = training_worker.train(runs / "begun-alone", Processes(device=torch.device("cpu")))
    assert f"{STOPPED} is of 2 processes: sums are rounded otherwise with 1" in found["said"]
    assert logged(runs / "begun-alone")[-1] == pytest.approx(logged(runs / "alone")[-1], rel=TOLERANCE)


def test_a_changed_number_of_processes_is_said_once(runs: Path) -> None:
    first, *others = saw(runs, "goes_on", 4)
    assert f"{STOPPED} is of 2 processes: sums are rounded otherwise with 4" in first["said"]
    assert [one["said"] for one in others] == [[], [], []]


def test_a_loss_that_is_not_finite_in_one_process_stops_all_and_names_it(runs: Path) -> None:
    first, second = saw(runs, "nan", 2)
    told = (
        "TrainingError: the denoiser loss is nan with gradient norm nan at step 3 (process 2 of 2): the last checkpoint"
    )
    assert first["error"].startswith(told)
    assert second["error"].startswith("PeerError: process 1 of 2 stopped")
    assert all(
        value.isfinite().all()
        for value in load_file(runs / "nan" / "checkpoints" / "step-00000002" / "state.safetensors").values()
    )


def test_a_full_disk_of_one_process_leaves_no_half_written_checkpoint(runs: Path) -> None:
    first, second = saw(runs, "full_disk", 2)
    assert re.match(r"KnnDiffusionError: .* \(the disk is full\): free space", second["error"])
    assert re.match(r"PeerError: process 2 of 2 stopped: .*the disk is full", first["error"])
    assert [one.name for one in (runs / "full" / "checkpoints").iterdir()] == ["step-00000004"]


def test_a_process_that_dies_is_told_of_by_the_others(runs: Path) -> None:
    told = saw(runs, "dies", 4)
    assert len(told) == 3
    assert all(
        re.match("TrainingError: another process of this run has died .* --resume", one["error"]) for one in told
    )
    assert [one.name for one in (runs / "dies" / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_batch_that_cannot_be_shared_is_refused(runs: Path) -> None:
    first, _ = saw(runs, "uneven", 2)
    assert first["error"].startswith("ConfigError: training.batch_size must be a multiple of the 2 processes, got 9")


def test_a_command_whose_worker_is_killed_goes_on_from_the_last_checkpoint(tmp_path: Path) -> None:
    pictures, model = draw_pictures(tmp_path / "pictures"), tmp_path / "model"
    build_model(model, pictures)
    (pictures / "broken.png").write_text("no picture")
    facts = json.loads((model / "denoiser" / "config.json").read_text())
    training = {"num_steps": 6, "batch_size": 4, "learning_rate": 1e-3, "checkpoint_every": 2, "log_every": 1}
    run = {"denoiser": facts["config"], "schedule": facts["extra"]["schedule"], "training": training}
    (tmp_path / "run.json").write_text(json.dumps(run | {"conditioning": {"k": 2}}))
    command = ["train", "denoiser", "--config", tmp_path / "run.json", "--images", pictures, "--index", model / "index"]
    command += [
        "--tokenizer",
        model / "tokenizer",
        "--output",
        tmp_path / "out",
        "--device",
        "cpu",
        "--resume",
        "--json",
    ]
    done = torchrun(2, WORKER, "command", "3", *command, restarts=1)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # one process speaks
    assert (result["step"], result["finished"]) == (6, True)
    assert done.stderr.count("skipped 1 of 13 pictures") == 2  # the first process, each time it is started
    assert "another process of this run has died" in done.stderr
    steps = [line["step"] for line in logged(tmp_path / "out") if "denoiser/loss" in line]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_memory_that_runs_out_in_one_process_stops_all_and_leaves_the_last_checkpoint(runs: Path) -> None:
    first, last = saw(runs, "runs_out", 2)
    assert last["error"].startswith("TrainingError: memory ran out on cpu, expected 0 MiB for weights, ")
    assert "another process of this run has died" in first["error"]
    (newest,) = sorted((runs / "runs_out" / "checkpoints").glob("step-*"))[-1:]
    assert newest.name == STOPPED
    found = training_worker.train(runs / "runs_out", Processes(device=torch.device("cpu")), micro_batch_size=2)
    assert "training.micro_batch_size was None, is 2 now" in found["said"]
    assert logged(runs / "runs_out")[-1] == pytest.approx(logged(runs / "alone")[-1], rel=TOLERANCE)


def test_parts_of_a_batch_are_drawn_as_the_whole() -> None:
    whole, halves = (
        generator_for(1, "x"),
        [BatchGenerator.of(1, "x", batch_size=5, rows=slice(*r)) for r in ((0, 2), (2, 5))],
    )
    for draw in (rand, randn):
        expected = draw(5, 3, generator=whole)
        parts = [draw(2, 3, generator=halves[0]), draw(3, 3, generator=halves[1])]
        assert torch.equal(torch.cat(parts), expected)


@pytest.mark.parametrize("changes", [{"micro_batch_size": 3}, {"activation_checkpointing": True}])
def test_settings_of_memory_change_rounding_alone(changes: dict[str, object], tmp_path: Path) -> None:
    alone = Processes(device=torch.device("cpu"))
    training_worker.train(tmp_path / "plain", alone)
    training_worker.train(tmp_path / "changed", alone, **changes)
    for one, other in zip(logged(tmp_path / "plain"), logged(tmp_path / "changed"), strict=True):
        assert other == pytest.approx(one, rel=TOLERANCE)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of tensors that torch only looks at
@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True, "micro_batch_size": 2}])
def test_blocks_are_compiled_once_and_change_rounding_alone(changes: dict[str, object], tmp_path: Path) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    alone = Processes(device=torch.device("cpu"))
    training_worker.train(tmp_path / "plain", alone, **changes)
    with mock.patch.object(training_denoiser, "compile_module", partial(compile_module, backend=counter)):
        training_worker.train(tmp_path / "compiled", alone, compile=True, **changes)
    assert counter.frame_count == 1  # for all blocks and steps
    for one, other in zip(logged(tmp_path / "plain"), logged(tmp_path / "compiled"), strict=True):
        assert other == pytest.approx(one, rel=TOLERANCE)
    weights = [load_file(tmp_path / name / "model" / "average.safetensors").keys() for name in ("plain", "compiled")]
    assert weights[0] == weights[1]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of tensors that torch only looks at
@pytest.mark.usefixtures("unchecked_shapes")
def test_a_compiler_that_does_not_work_is_told_in_a_line(tmp_path: Path) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("No working C++ compiler found")

    with (
        mock.patch.object(training_denoiser, "compile_module", partial(compile_module, backend=broken)),
        pytest.raises(
            MissingDependencyError, match=r"torch.compile to work here, got .*No working C.. compiler.*: install"
        ),
    ):
        training_worker.train(tmp_path, Processes(device=torch.device("cpu")), compile=True)


def test_recomputed_activations_are_not_kept() -> None:
    def kept(network: Denoiser) -> int:
        numbers = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal numbers
            numbers += tensor.numel()
            return tensor

        objective = training_worker.Toy(training_worker.settings())
        batch = training_worker.Data.drawn().batch(torch.arange(8), torch.Generator())
        objective.predict = network
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            objective.loss(batch, 1, torch.Generator().manual_seed(0))
        return numbers

    network = Denoiser(training_worker.SHAPE)
    plain = kept(network)
    network.activation_checkpointing = True
    assert kept(network) < plain / 2


def test_an_objective_over_whole_batches_is_not_cut() -> None:
    objective = training_worker.Toy(training_worker.settings())
    check_divisible(objective, batch_size=8, cut=True, processes=Processes(device=torch.device("cpu")))
    with pytest.raises(
        UsageError, match="expected one process, and no micro_batch_size, .* for object, .* leave them out"
    ):
        check_divisible(object(), batch_size=8, cut=True, processes=Processes(device=torch.device("cpu")))


def test_parts_that_know_one_process_say_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(
        UsageError, match="expected one process to train the encoder, whose loss .*, got 4: run it without"
    ):
        refuse_many("encoder", "loss compares all pictures of a batch")
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(PeerError):
        refuse_many("encoder", "loss compares all pictures of a batch")


@pytest.mark.parametrize(
    ("device", "gpus", "message"), [("cuda", 1, "got 1 for at least 3"), ("cuda:1", 4, "got cuda:1")]
)
def test_every_process_needs_a_gpu_of_its_own(
    device: str, gpus: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setattr("knn_diffusion.training.processes.choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(UsageError, match=message), joined(device):
        pass


def test_a_micro_batch_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="micro_batch_size must be at least 1, got 0"):
        training_worker.settings(micro_batch_size=0)
