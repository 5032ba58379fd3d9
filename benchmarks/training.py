"""Claim: on one GPU at the paper's size training reaches 45 % of the machine's matrix-product rate, and waits for data under 2 %.

    python benchmarks/training.py [--size tiny|small|stickers|paper] [--batch 8] [--set parallel=fsdp …] [--steps 5] [--json]
    torchrun --standalone --nproc-per-node 8 benchmarks/training.py --size paper --batch 256

Whole steps of the training loop are measured on random data that lies on the disk as that of a run does, in the page cache: the batch is
gathered, noised, predicted, differentiated and learned from, and the average follows. Validation and checkpoints are left out. The
share of the machine's rate is what matrix products and attention compute in a step, forwards and backwards, what is computed again
included, by the time of the median step, against the best square matrix product in the same arithmetic. A thread gathers
the next batch meanwhile; waiting is the time in which the loop needs it and does not have it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from speed.machine import commit, hardware, matmul_rate, operations, peak_bytes, synchronize
from speed.ours import SIZES

from knn_diffusion.cli.configuration import merged, parse_changes
from knn_diffusion.config import from_dict
from knn_diffusion.device import choose_dtype
from knn_diffusion.diffusion.process import Schedule
from knn_diffusion.image_index import FrozenIndex
from knn_diffusion.models.denoiser import DenoiserConfig
from knn_diffusion.models.tokenizer import VQGAN, TokenizerConfig
from knn_diffusion.retrieval.dedup import OFF
from knn_diffusion.retrieval.segments import stored_rows
from knn_diffusion.retrieval.store import EncoderIdentity, Item, Store
from knn_diffusion.tokens import CONTENT_BYTES, PART_IMAGES, Made, Makers, TokenFolder, UnitFacts
from knn_diffusion.training.ahead import Ahead
from knn_diffusion.training.conditioning import ConditioningConfig
from knn_diffusion.training.denoiser import DenoiserObjective, DenoiserRun
from knn_diffusion.training.neighbors import DenoiserData
from knn_diffusion.training.plan import TrainingConfig
from knn_diffusion.training.processes import Processes, joined
from knn_diffusion.training.step import Run, begin, own_rows, take_step, warm_up

NEIGHBORS = 10
PAPER_IMAGES = 70_000_000
"""What the paper trained on."""


def random_data(config: DenoiserConfig, items: int, neighbors: int, folder: Path) -> DenoiserData:
    """Tokens, unit embeddings and neighbor lists of images that never were, on the disk as those of a run are."""
    rng, dim = np.random.default_rng(0), config.condition_dim
    store = Store.create(folder / "index", EncoderIdentity(name="random", fingerprint="random", dim=dim))
    makers = Makers(tokenizer="", seq=config.seq, vocab_size=config.vocab_size, encoder="", dim=dim)
    tokens = TokenFolder(folder / "tokens", makers)
    for start in range(0, items, PART_IMAGES):
        count = min(PART_IMAGES, items - start)
        contents = rng.integers(0, 256, (count, CONTENT_BYTES), dtype=np.uint8)
        rows = [Item(source=f"{number}", content=one.tobytes().hex()) for number, one in enumerate(contents, start)]
        vectors = stored_rows(rng.normal(size=(count, dim)), dim, "random")
        store.append(rows, vectors)
        codes = rng.integers(0, config.vocab_size, (count, config.seq)).astype(np.uint16)
        part = tokens.write_part(
            f"{start:012}", 0, Made(contents=contents, embeddings=vectors, tokens=codes, skipped=[])
        )
        tokens.close(f"{start:012}", UnitFacts(files=[], parts=[part], skipped=[]))
    lists = rng.integers(0, items, (items, neighbors), dtype=np.int32)
    every = np.arange(items)
    read = {"grid_m": config.grid_neighbors, "grid_rows": every} if config.grid_neighbors else {}
    return DenoiserData(examples=tokens.examples(), items=every, neighbors=lists, table=FrozenIndex(store, OFF), **read)


def objective_of(config: DenoiserConfig, training: TrainingConfig, data: DenoiserData) -> DenoiserObjective:
    """What the paper minimises, with a tokenizer that is never asked."""
    schedule = Schedule(num_steps=config.num_steps, vocab_size=config.vocab_size, preset="released")
    conditioning = ConditioningConfig(k=NEIGHBORS, condition_dropout=0.0)
    run = DenoiserRun(
        denoiser=config, schedule=schedule, training=training, conditioning=conditioning, step_sampling="importance"
    )
    idle = VQGAN(TokenizerConfig(image_size=16, grid=4, vocab_size=8, code_dim=4, channels=8, decoder_blocks=1))
    return DenoiserObjective(run, data, idle, "random")


def measured(
    config: DenoiserConfig, training: TrainingConfig, steps: int, items: int, processes: Processes, folder: Path
) -> dict[str, Any]:
    """Figures of a step, over all processes; random data goes into the folder."""
    torch.manual_seed(0)
    data = random_data(config, items, NEIGHBORS, folder)

    def begun_anew(training: TrainingConfig) -> Run:
        run = begin(objective_of(config, training, data), training, Path("nowhere"), processes)
        warm_up(run, data)
        return run

    plain = begun_anew(replace(training, compile=False))  # torch counts what it computes itself, not what it compiles
    work = operations(lambda: take_step(plain, own_rows(plain, data, 1)))
    del plain
    going = begun_anew(training)
    with Ahead(partial(own_rows, going, data), training.num_steps) as ahead:
        first = time.perf_counter()
        take_step(going, ahead.take(going.step + 1))
        first = time.perf_counter() - first
        take_step(going, ahead.take(going.step + 1))
        seconds: list[float] = []
        ahead.waited = 0.0
        for _ in range(steps):
            synchronize(processes.device)
            begun = time.perf_counter()
            take_step(going, ahead.take(going.step + 1))
            synchronize(processes.device)
            seconds.append(time.perf_counter() - begun)
    rate = matmul_rate(processes.device, choose_dtype(processes.device, training.precision))
    step = statistics.median(seconds)
    return {
        "matmul_tflops": round(rate / 1e12, 3),
        "seconds_of_first_step": round(first, 2),
        "seconds_per_step": round(step, 4),
        "images_per_second": round(training.batch_size / step, 2),
        "operations_per_image": work * processes.size // training.batch_size,
        "share_of_matmul_rate": round(work / step / rate, 3),
        "share_waiting_for_data": round(ahead.waited / sum(seconds), 4),
        "peak_mib": round(peak_bytes(processes.device) / 2**20),
        "reckoned_mib": round(going.memory.need.of(going.memory.setting.micro_batch) / 2**20),
        "days_for_70_million_images": round(PAPER_IMAGES * step / training.batch_size / 86_400, 2),
        "device_hours_for_70_million_images": round(PAPER_IMAGES * step / training.batch_size / 3600 * processes.size),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch", type=int, default=8, help="images of a step, over all processes")
    parser.add_argument("--steps", type=int, default=5, help="steps to time, after two")
    parser.add_argument("--items", type=int, default=20_000, help="images there are")
    parser.add_argument(
        "--set", action="append", default=[], help="a setting of training: activation_checkpointing=true"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    config = SIZES[args.size]
    asked = {"num_steps": 1_000_000, "batch_size": args.batch, "learning_rate": 2e-4}
    training = from_dict(TrainingConfig, merged(asked, parse_changes(args.set)))
    with joined(args.device) as processes, TemporaryDirectory() as folder:
        report = {
            "commit": commit(),
            "hardware": hardware(processes.device),
            "processes": processes.size,
            "torch": torch.__version__,
            "precision": str(choose_dtype(processes.device, training.precision)).removeprefix("torch."),
            "size": args.size,
            "depth": config.depth,
            "width": config.width,
            "tokens": config.seq,
            "vocab_size": config.vocab_size,
            "batch": args.batch,
            "settings": args.set,
            **measured(config, training, args.steps, args.items, processes, Path(folder)),
        }
    if not processes.first:
        return
    if args.json:
        print(json.dumps(report))
        return
    for name, value in report.items():
        print(f"{name:28} {value}")


if __name__ == "__main__":
    main()
