"""Does a run fit into its GPU: the reckoning against what tensors really take, and what is said when it does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import training_worker
from live_bytes import LiveBytes, saved_bytes
from test_loop import Line, Points

from knn_diffusion.diffusion.process import Schedule
from knn_diffusion.errors import PeerError, TrainingError
from knn_diffusion.models.denoiser import Denoiser, DenoiserConfig
from knn_diffusion.models.tokenizer import VQGAN
from knn_diffusion.presets import DENOISERS
from knn_diffusion.training import loop, memory, processes
from knn_diffusion.training.activations import Activations
from knn_diffusion.training.denoiser import DenoiserObjective, DenoiserRun
from knn_diffusion.training.memory import MemoryWatch, Setting, need
from knn_diffusion.training.options import RunOptions
from knn_diffusion.training.processes import Processes
from knn_diffusion.training.step import begin, own_rows, take_step

TINY = DenoiserConfig(vocab_size=64, grid=8, width=64, depth=2, heads=4, condition_dim=32, num_steps=100)
MIDDLING = DenoiserConfig(vocab_size=700, grid=20, width=128, depth=4, heads=4, condition_dim=96, num_steps=100)
STICKERS = replace(DENOISERS["stickers-cpu"].denoiser, depth=4)
VQ = replace(MIDDLING, step_table=True, sigmoid_gelu=True, cross_attention_bias=True, plain_slots=True)
GRIDS = replace(MIDDLING, patch_size=2, local_width=48, local_blocks=2, grid_neighbors=3, grid_layers=2)
COPIES = replace(GRIDS, copy_window=3)
NEIGHBORS, AT_ONCE, GIB = 10, 12, 2**30
CPU = Processes(device=torch.device("cpu"))
GPU = Processes(device=torch.device("cuda", 0))


def objective_of(config: DenoiserConfig, preset: Any = "released", **training: object) -> DenoiserObjective:
    run = DenoiserRun(
        denoiser=config,
        schedule=Schedule(num_steps=config.num_steps, vocab_size=config.vocab_size, preset=preset),
        training=training_worker.settings(**training),
    )
    codes = replace(training_worker.TOKENIZER, vocab_size=config.vocab_size, code_dim=config.code_dim or 4)
    return DenoiserObjective(run, training_worker.Data.drawn(10, config).inner, VQGAN(codes), "random")


def batch_of(config: DenoiserConfig) -> dict[str, torch.Tensor]:
    grids = torch.randint(0, config.vocab_size, (AT_ONCE, config.grid_neighbors, config.seq))
    read = {"grids": grids, "grids_present": torch.ones(grids.shape[:2], dtype=torch.bool)}
    return (read if config.grid_neighbors else {}) | {
        "tokens": torch.randint(0, config.vocab_size, (AT_ONCE, config.seq)),
        "query": torch.nn.functional.normalize(torch.randn(AT_ONCE, config.condition_dim), dim=-1),
        "neighbors": torch.nn.functional.normalize(torch.randn(AT_ONCE, NEIGHBORS, config.condition_dim), dim=-1),
        "present": torch.ones(AT_ONCE, NEIGHBORS, dtype=torch.bool),
    }


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(
    ("config", "preset", "bfloat16"),
    [
        (TINY, "released", False),
        (TINY, "mask-and-replace", False),
        (MIDDLING, "released", False),
        (MIDDLING, "released", True),
        (MIDDLING, "mask-and-replace", True),
        (STICKERS, "absorbing", False),
        (VQ, "released", True),
        (GRIDS, "absorbing", False),
        (GRIDS, "absorbing", True),
        (COPIES, "absorbing", False),
        (COPIES, "absorbing", True),
    ],
)
def test_the_reckoned_activations_are_those_that_are_alive(
    config: DenoiserConfig, preset: str, bfloat16: bool, recomputed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective = objective_of(config, preset)
    if preset == "absorbing":  # most is alive where every token is masked
        everything = torch.full((AT_ONCE, config.seq), config.vocab_size)
        monkeypatch.setattr("knn_diffusion.training.denoiser.q_sample", lambda *_: everything)
    objective.denoiser.activation_checkpointing = recomputed
    for parameter in objective.denoiser.parameters():
        parameter.grad = torch.zeros_like(parameter)  # part of the state
    batch = batch_of(config)
    with LiveBytes() as alive:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            loss = objective.loss(batch, 1, torch.Generator().manual_seed(0))["loss"]
        loss.backward()
    reckoned = objective.activations(bfloat16=bfloat16, recomputed=recomputed).of(AT_ONCE)
    assert 0.93 < reckoned / alive.most < 1.03  # too little rather than too much: then no run is refused that would fit


def test_what_is_kept_for_the_backward_pass_is_most_of_it() -> None:
    objective, batch = objective_of(MIDDLING), batch_of(MIDDLING)
    own = {parameter.untyped_storage().data_ptr() for parameter in objective.denoiser.parameters()}
    kept = saved_bytes(lambda: objective.loss(batch, 1, torch.Generator().manual_seed(0))["loss"], own)
    reckoned = objective.activations(bfloat16=False, recomputed=False)
    assert reckoned.of(AT_ONCE) - 12 * AT_ONCE * MIDDLING.seq * MIDDLING.vocab_size == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize("config", [training_worker.SHAPE, replace(training_worker.SHAPE, width=32, depth=3)])
def test_the_state_is_counted_to_the_byte_but_for_the_counters(config: DenoiserConfig, tmp_path: Path) -> None:
    objective = objective_of(config, batch_size=4)
    run = begin(objective, training_worker.settings(batch_size=4), tmp_path, CPU)
    take_step(run, own_rows(run, training_worker.Data.drawn(), 1))
    moments = [
        value for one in run.optimizers["denoiser"][0].state.values() for name, value in one.items() if name != "step"
    ]
    gradients = [parameter.grad for parameter in objective.modules.parameters()]
    held = [*objective.modules.state_dict().values(), *objective.network.state_dict().values(), *gradients, *moments]
    assert run.memory.need.state == sum(tensor.nbytes for tensor in held if tensor is not None)


def setting(**changes: Any) -> Setting:
    values = {"bfloat16": False, "recomputed": False, "fsdp": False, "processes": 1, "micro_batch": 8}
    return Setting(**(values | changes))


def test_fsdp_holds_a_share_of_the_state_but_begins_with_the_whole_network() -> None:
    objective = objective_of(MIDDLING)
    alone, spread = need(objective, setting()), need(objective, setting(fsdp=True, processes=4))
    weights = sum(parameter.nbytes for parameter in objective.modules.parameters())
    blocks = [sum(p.nbytes for layer in layers for p in layer.parameters()) for layers in objective.denoiser.shards]
    gathered = weights - sum(blocks[1:])
    assert alone.state == pytest.approx(5 * weights, rel=0.001)
    assert spread.state == pytest.approx(5 * weights / 4 + 2 * gathered, rel=0.001)
    assert spread.start == pytest.approx(2 * weights, rel=0.001)
    assert need(objective, setting(fsdp=True)).state == alone.state


def test_as_many_examples_fit_as_the_room_allows() -> None:
    pass_ = Activations(made=100, forward=10, kept=0, backward=30)
    assert [pass_.of(count) for count in (1, 4, 5, 6)] == [110, 140, 150, 180]
    for room in range(90, 400):
        fits = pass_.fitting(room)
        assert fits < 1 or pass_.of(fits) <= room < pass_.of(fits + 1)


# What is said


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU that is not there, with as many bytes free as a test says."""
    has = {"free": 80 * GIB, "bfloat16": True}
    monkeypatch.setattr(memory, "free_bytes", lambda device: has["free"])
    monkeypatch.setattr(memory, "device_name", lambda device: f"{device} (a card)")
    monkeypatch.setattr(memory, "computes_bfloat16", lambda device: has["bfloat16"])
    auto = {"auto": "bfloat16" if has["bfloat16"] else "float32"}
    monkeypatch.setattr(memory, "choose_dtype", lambda device, name: getattr(torch, auto.get(name, name)))
    return has


def paper_run(**changes: object) -> tuple[Any, Any]:
    """The paper's denoiser, as names and shapes alone."""
    preset = DENOISERS["paper-photo"]
    training = replace(preset.training, **changes)  # type: ignore[arg-type]
    objective = objective_of(TINY)
    objective.run = replace(preset, training=training)
    with torch.device("meta"):
        objective.denoiser = Denoiser(preset.denoiser)
    objective.network = objective.denoiser
    objective.modules = torch.nn.ModuleDict({"denoiser": objective.denoiser})
    return objective, training


@pytest.fixture(scope="module")
def paper() -> Any:
    return paper_run()


def told(paper: Any, processes: Processes = GPU, **changes: object) -> str:
    objective, training = paper
    with pytest.raises(TrainingError) as raised:
        MemoryWatch(objective, replace(training, **changes), processes).check()
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_too_little_memory_is_said_with_what_would_fit(gpu: dict[str, Any], paper: Any) -> None:
    gpu["free"] = 24 * GIB
    objective, training = paper
    said = told(paper)
    assert said.startswith("expected 9.1 GiB for weights, gradients, average and AdamW's moments and ")
    assert "GiB for 256 examples at once, got 24.0 GiB free on cuda:0 (a card): add --set " in said
    micro, recomputed = said.partition(": add ")[2].split(", or ")
    largest = int(micro.removeprefix("--set training.micro_batch_size="))
    watch = MemoryWatch(objective, replace(training, micro_batch_size=largest), GPU)
    watch.check()
    assert watch.need.of(largest) <= 0.95 * 24 * GIB < watch.need.of(largest + 1)
    assert recomputed.startswith("--set training.activation_checkpointing=true --set training.micro_batch_size=")
    more = int(recomputed.rpartition("=")[2])
    assert more > 3 * largest
    MemoryWatch(objective, replace(training, micro_batch_size=more, activation_checkpointing=True), GPU).check()


def test_bfloat16_is_advised_where_the_gpu_has_it(gpu: dict[str, Any], paper: Any) -> None:
    asked = {"precision": "float32", "micro_batch_size": 40}
    assert "add --set training.micro_batch_size=3" in told(paper, **asked)
    assert ", or --set training.precision=bfloat16, or --set training.activation" in told(paper, **asked)
    gpu["bfloat16"] = False
    assert "precision" not in told(paper, **asked)


def test_sharding_is_advised_where_nothing_else_fits(gpu: dict[str, Any], paper: Any) -> None:
    gpu["free"] = 8 * GIB
    said = told(paper, micro_batch_size=4)
    assert said.endswith(
        ": add --set training.parallel=fsdp --set training.activation_checkpointing=true, on 2 such GPUs "
        "(torchrun --nproc-per-node 2)"
    )


def test_a_gpu_that_nothing_fits_is_told_what_it_lacks(gpu: dict[str, Any], paper: Any) -> None:
    gpu["free"] = 2 * GIB
    assert ": use a GPU with 10." in told(paper)
    assert told(paper).endswith(" free, or a smaller network")


def test_each_process_counts_its_own_share(gpu: dict[str, Any], paper: Any) -> None:
    many = replace(GPU, size=8, rank=3)
    gpu["free"] = 48 * GIB
    assert "9.1 GiB for weights, gradients, average and AdamW's moments and 41.4" in told(paper, many)
    assert "GiB for 32 examples at once, got 48.0 GiB free" in told(paper, many)
    assert ": add --set training.micro_batch_size=28, or --set training.parallel=fsdp, or --set" in told(paper, many)
    objective, training = paper
    MemoryWatch(objective, replace(training, parallel="fsdp"), many).check()


def test_a_run_that_fits_is_let_go(gpu: dict[str, Any], paper: Any) -> None:
    objective, training = paper
    MemoryWatch(objective, replace(training, micro_batch_size=32), GPU).check()
    gpu["free"] = None
    MemoryWatch(objective, training, GPU).check()


def test_an_objective_over_whole_batches_is_held_to_its_state(gpu: dict[str, Any], tmp_path: Path) -> None:
    gpu["free"] = 100
    config = training_worker.settings(batch_size=8)
    with pytest.raises(
        TrainingError, match=r"expected 0 MiB for weights.*, got 0 MiB free .*start again with --set training"
    ):
        loop.train(Line(), Points(), config, RunOptions(output=tmp_path / "run", device="cpu"))
    assert not (tmp_path / "run").exists()


class Full(training_worker.Toy):
    """Runs out of memory in a step, when more than so many examples are computed at once."""

    def __init__(self, training: Any, *, at: int, most: int = 0, error: RuntimeError | None = None) -> None:
        super().__init__(training)
        self.at, self.most, self.error = at, most, error or torch.OutOfMemoryError("CUDA out of memory. Tried to …")

    def loss(self, batch: Any, step: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        if step >= self.at and len(batch["tokens"]) > self.most:
            raise self.error
        return super().loss(batch, step, generator)


def test_running_out_in_a_step_leaves_the_last_checkpoint_and_goes_on_with_less(
    gpu: dict[str, Any], tmp_path: Path
) -> None:
    gpu["bfloat16"] = False
    config = training_worker.settings(checkpoint_every=2)
    options, data = RunOptions(output=tmp_path, resume=True, device="cpu"), training_worker.Data.drawn()
    with pytest.raises(TrainingError) as raised:
        loop.train(Full(config, at=4, most=4), data, config, options)
    said = str(raised.value)
    assert said.startswith("memory ran out on cpu (a card), which had 80.0 GiB free, expected 0 MiB for weights, ")
    assert (
        ": add --set training.micro_batch_size=4, or --set training.activation_checkpointing=true; --resume goes on"
        in said
    )
    assert [one.name for one in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    less = replace(config, micro_batch_size=4)
    result = loop.train(Full(less, at=4, most=4), data, less, options)
    whole = loop.train(training_worker.Toy(config), data, config, replace(options, output=tmp_path / "whole"))
    assert result.finished
    assert result.metrics == pytest.approx(whole.metrics, rel=1e-5)


@pytest.mark.parametrize("text", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"])
def test_libraries_that_find_no_memory_are_told_alike(text: str, tmp_path: Path) -> None:
    config = training_worker.settings()
    options = RunOptions(output=tmp_path, device="cpu")
    with pytest.raises(
        TrainingError, match=r"memory ran out on cpu, expected .*: add --set training.micro_batch_size=4 "
    ):
        loop.train(Full(config, at=1, error=RuntimeError(text)), training_worker.Data.drawn(), config, options)


def test_other_errors_are_not_taken_for_it(tmp_path: Path) -> None:
    config = training_worker.settings()
    with pytest.raises(RuntimeError, match="a shape"):
        loop.train(
            Full(config, at=1, error=RuntimeError("a shape")),
            training_worker.Data.drawn(),
            config,
            RunOptions(output=tmp_path, device="cpu"),
        )


def test_of_many_processes_that_run_out_one_speaks(paper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    monkeypatch.setattr(processes, "_get_default_store", lambda: store)
    objective, training = paper
    raised: list[type[Exception]] = []
    for rank in range(3):
        watch = MemoryWatch(
            objective, replace(training, parallel="fsdp"), Processes(device=CPU.device, size=4, rank=rank)
        )
        try:
            with watch.running():
                raise torch.OutOfMemoryError
        except (TrainingError, PeerError) as error:
            raised.append(type(error))
    assert raised == [TrainingError, PeerError, PeerError]


def test_validation_computes_no_more_at_once_than_training() -> None:
    whole, cut = objective_of(TINY, batch_size=6), objective_of(TINY, batch_size=6, micro_batch_size=2)
    cut.denoiser.load_state_dict(whole.denoiser.state_dict())
    most = []
    cut.denoiser.register_forward_pre_hook(lambda module, inputs: most.append(len(inputs[0])))
    figures = []
    for objective in (whole, cut):
        objective._preview = lambda network, device: None  # type: ignore[method-assign]
        with torch.no_grad():
            figures.append(objective.validate(objective.denoiser, 1, torch.Generator().manual_seed(1)).metrics)
    assert max(most) == 2
    assert figures[0] == pytest.approx(figures[1], rel=1e-5)
