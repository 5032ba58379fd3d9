"""One process of a training that tests start by torchrun: python training_worker.py FOLDER SCENARIO…

What a process saw and how it ended it writes to FOLDER/SCENARIO/rank-N.json.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from knn_diffusion import checkpoint
from knn_diffusion.cli import main as command_line
from knn_diffusion.compiler import compile_module
from knn_diffusion.diffusion import losses
from knn_diffusion.diffusion.process import Schedule
from knn_diffusion.errors import KnnDiffusionError
from knn_diffusion.models.denoiser import DenoiserConfig
from knn_diffusion.models.tokenizer import VQGAN, TokenizerConfig
from knn_diffusion.tokens import Makers
from knn_diffusion.training import denoiser as training_denoiser
from knn_diffusion.training import log, loop
from knn_diffusion.training.conditioning import ConditioningConfig
from knn_diffusion.training.data import Batch
from knn_diffusion.training.denoiser import DenoiserObjective, DenoiserRun
from knn_diffusion.training.neighbors import DenoiserData
from knn_diffusion.training.objective import Validation
from knn_diffusion.training.options import RunOptions
from knn_diffusion.training.plan import TrainingConfig
from knn_diffusion.training.processes import Processes, joined

SHAPE = DenoiserConfig(vocab_size=8, grid=4, width=16, depth=2, heads=2, condition_dim=6, num_steps=5, step_width=8)
TOKENIZER = TokenizerConfig(image_size=16, grid=4, vocab_size=8, code_dim=4, channels=8, decoder_blocks=1)
STEPS, STOP = 8, 4


def settings(**changes: object) -> TrainingConfig:
    values: dict[str, Any] = {"num_steps": STEPS, "batch_size": 8, "learning_rate": 3e-3, "warmup_steps": 3}
    values |= {"precision": "float32", "validate_every": 100, "checkpoint_every": 100, "log_every": 1}
    return TrainingConfig(**(values | changes))


@dataclass
class Data:
    """Random images' tokens, embeddings and neighbors; remembers which were asked for."""

    inner: DenoiserData
    seen: list[list[int]] = field(default_factory=list)

    @classmethod
    def drawn(cls, items: int = 30, shape: DenoiserConfig = SHAPE) -> Data:
        rng = np.random.default_rng(0)
        table = rng.normal(size=(items, shape.condition_dim)).astype(np.float32)
        table /= np.linalg.norm(table, axis=1, keepdims=True)
        tokens = rng.integers(0, shape.vocab_size, (items, shape.seq))
        neighbors = rng.integers(-1, items, (items, 3)).astype(np.int64)
        makers = Makers(tokenizer="", seq=shape.seq, vocab_size=shape.vocab_size, encoder="", dim=shape.condition_dim)
        examples = np.empty(items, makers.record)
        examples["tokens"], examples["embedding"] = tokens, table
        return cls(DenoiserData(examples=examples, items=np.arange(items), neighbors=neighbors, table=table))

    def __len__(self) -> int:
        return len(self.inner)

    def batch(self, indices: Tensor, generator: torch.Generator) -> Batch:
        self.seen.append(indices.tolist())
        return self.inner.batch(indices, generator)


class Toy(DenoiserObjective):
    """The real objective; may break in one process, and keeps its validation to a number."""

    def __init__(self, training: TrainingConfig, poisoned: bool = False) -> None:
        torch.manual_seed(3)
        run = DenoiserRun(
            denoiser=SHAPE,
            schedule=Schedule(num_steps=SHAPE.num_steps, vocab_size=SHAPE.vocab_size, preset="mask-and-replace"),
            training=training,
            conditioning=ConditioningConfig(k=3, condition_dropout=0.2, query_dropout=0.2, query_noise=0.3),
            step_sampling="importance",
        )
        super().__init__(run, Data.drawn(6).inner, VQGAN(TOKENIZER), "toy")
        self.poisoned = poisoned

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        found = super().loss(batch, step, generator)
        return found | {"loss": found["loss"] * float("nan")} if self.poisoned and step == 3 else found

    def validate(self, network: nn.Module, step: int, generator: torch.Generator) -> Validation:
        return Validation(metrics=super().validate(network, step, generator).metrics)

    def _preview(self, network: nn.Module, device: torch.device) -> Any:
        return None

    def export(self, network: nn.Module, folder: Path, facts: Mapping[str, object]) -> None:
        checkpoint.save_weights(made(folder) / "average.safetensors", network.state_dict())


def made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def train(
    output: Path, processes: Processes, *, stop: int | None = None, poisoned: bool = False, **changes: object
) -> dict[str, Any]:
    """Train the toy to the end or to a stop, going on with what there is; returns what this process saw."""
    training, data, said = settings(**changes), Data.drawn(), list[str]()
    options = RunOptions(output=output, resume=True, notice=said.append)
    options = options if processes.first else options.silent()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(losses, "WARM_DRAWS", 1))  # so that steps are drawn by importance soon
        if stop is not None:
            step = loop.take_step

            def interrupted(run: Any, dataset: Any) -> dict[str, float]:
                os.kill(os.getpid(), 15) if processes.rank == processes.size - 1 and run.step == stop - 1 else None
                return step(run, dataset)

            stack.enter_context(mock.patch.object(loop, "take_step", interrupted))
        try:
            result = loop.train(Toy(training, poisoned), data, training, options, processes)
        except KeyboardInterrupt:
            return {"seen": data.seen, "said": said, "metrics": {}}
    return {"seen": data.seen, "said": said, "metrics": result.metrics}


def kinds(folder: Path, name: str, processes: Processes, **changes: object) -> dict[str, Any]:
    """Once without a stop, and once with one."""
    train(folder / f"{name}-parts", processes, stop=STOP, **changes)
    train(folder / f"{name}-parts", processes, **changes)
    return train(folder / name, processes, **changes)


def ddp(folder: Path, processes: Processes) -> dict[str, Any]:
    return kinds(folder, f"ddp-{processes.size}", processes)


def fsdp(folder: Path, processes: Processes) -> dict[str, Any]:
    changes = {"micro_batch_size": 2, "activation_checkpointing": True}
    return kinds(folder, f"fsdp-{processes.size}", processes, parallel="fsdp", **changes)


def compiled(folder: Path, processes: Processes) -> dict[str, Any]:
    """Blocks compiled as far as that takes no compiler."""
    traced = partial(compile_module, backend="aot_eager")
    with mock.patch.object(training_denoiser, "compile_module", traced):
        train(folder / "compiled-ddp", processes, compile=True)
        return train(folder / "compiled-fsdp", processes, compile=True, parallel="fsdp", activation_checkpointing=True)


def goes_on(folder: Path, processes: Processes) -> dict[str, Any]:
    """What another number of processes began."""
    return train(folder / "begun", processes, parallel="fsdp")


def nan(folder: Path, processes: Processes) -> dict[str, Any]:
    return train(folder / "nan", processes, poisoned=processes.rank == 1, checkpoint_every=2)


def full_disk(folder: Path, processes: Processes) -> dict[str, Any]:
    """The last process finds no space at its second checkpoint."""
    save, calls = checkpoint.save_file, [0]

    def failing(weights: dict[str, Tensor], path: Path) -> None:
        calls[0] += "checkpoints" in path.parts
        if processes.rank == processes.size - 1 and calls[0] == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save(weights, path)

    with mock.patch.object(checkpoint, "save_file", failing):
        return train(folder / "full", processes, parallel="fsdp", checkpoint_every=4)


def uneven(folder: Path, processes: Processes) -> dict[str, Any]:
    return train(folder / "uneven", processes, batch_size=9)


def dies(folder: Path, processes: Processes) -> dict[str, Any]:
    """The last process is killed in the middle of a step."""
    step = loop.take_step

    def dying(run: Any, dataset: Any) -> dict[str, float]:
        os.kill(os.getpid(), 9) if processes.rank == processes.size - 1 and run.step == STOP else None
        return step(run, dataset)

    with mock.patch.object(loop, "take_step", dying):
        return train(folder / "dies", processes, checkpoint_every=3)


def runs_out(folder: Path, processes: Processes) -> dict[str, Any]:
    """The last process finds no memory in the middle of a step."""

    def full(toy: Toy, batch: Batch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        if processes.rank == processes.size - 1 and step == STOP + 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return DenoiserObjective.loss(toy, batch, step, generator)

    with mock.patch.object(Toy, "loss", full):
        return train(folder / "runs_out", processes, parallel="fsdp", checkpoint_every=2)


ENDS = ("dies", "runs_out")
"""After these the processes cannot talk to each other any more."""
SCENARIOS: dict[str, Callable[[Path, Processes], dict[str, Any]]] = {
    one.__name__: one for one in (ddp, fsdp, compiled, goes_on, nan, full_disk, uneven, dies, runs_out)
}


def command_that_dies_once(step_to_die: int, arguments: list[str]) -> int:
    """The command line, whose last process is killed after a step when it was not restarted yet."""
    step = loop.take_step

    def dying(run: Any, dataset: Any) -> dict[str, float]:
        if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and run.processes.rank and run.step == step_to_die:
            os.kill(os.getpid(), 9)
        return step(run, dataset)

    with mock.patch.object(loop, "take_step", dying):
        return command_line(arguments)


def run_scenarios(folder: Path, names: list[str]) -> None:
    dist.init_process_group("gloo")
    mock.patch.object(log, "_tensorboard", return_value=None).start()  # it takes seconds to import
    for name in names:
        if name in ENDS:  # or torchrun stops who still writes down what it saw
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            with joined("cpu") as processes:
                found = SCENARIOS[name](folder, processes)
        except KnnDiffusionError as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        path = made(folder / f"saw-{name}") / f"{dist.get_rank()}-of-{dist.get_world_size()}.json"
        path.write_text(json.dumps(found))
        if name in ENDS:
            os._exit(0)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "command":
        sys.exit(command_that_dies_once(int(sys.argv[2]), sys.argv[3:]))
    run_scenarios(Path(sys.argv[1]), sys.argv[2:])
