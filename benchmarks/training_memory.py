"""Claim: a run says before its first step what it takes, and its reckoning is what tensors take on a GPU.

    python benchmarks/training_memory.py [--size tiny|small|paper] [--processes 8] [--batch 1 4 8 16 32 64] [--json]

Prints what a process that trains the denoiser needs, by the number of examples that it computes at once and by the settings of
memory: what the package itself holds against the memory that is free. Nothing is computed, so no GPU is needed. What a step really
takes `benchmarks/training.py` measures on a GPU, as `peak_mib` beside `reckoned_mib`; on a CPU the tests do.
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from typing import Any

import numpy as np
import torch
from speed.machine import commit
from speed.ours import SIZES
from training import NEIGHBORS, objective_of

from knn_diffusion.models.denoiser import DenoiserConfig
from knn_diffusion.training.memory import Setting, need
from knn_diffusion.training.neighbors import DenoiserData
from knn_diffusion.training.plan import TrainingConfig


def reckoned(config: DenoiserConfig, batches: list[int], processes: int) -> list[dict[str, Any]]:
    """GiB of a process, one row for each combination of settings."""
    training = TrainingConfig(num_steps=1, batch_size=1, learning_rate=1.0)
    nobody = np.empty((0, NEIGHBORS), np.int64)
    nothing = DenoiserData(examples=nobody, items=nobody[:, 0], neighbors=nobody, table=nobody)
    with torch.device("meta"):
        objective = objective_of(config, training, nothing)
    rows = []
    for fsdp, bfloat16, recomputed in product((False, True), (False, True), (False, True)):
        setting = Setting(
            bfloat16=bfloat16, recomputed=recomputed, fsdp=fsdp, processes=processes if fsdp else 1, micro_batch=1
        )
        wanted = need(objective, setting)
        rows.append(
            {
                "parallel": f"fsdp on {processes}" if fsdp else "ddp",
                "precision": "bfloat16" if bfloat16 else "float32",
                "activation_checkpointing": recomputed,
                "state_gib": round(wanted.state / 2**30, 2),
                "gib": {batch: round(wanted.of(batch) / 2**30, 1) for batch in batches},
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="paper")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64], help="examples at once")
    parser.add_argument("--processes", type=int, default=8, help="that FSDP spreads the state over")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    config = SIZES[args.size]
    rows = reckoned(config, args.batch, args.processes)
    if args.json:
        print(json.dumps({"commit": commit(), "size": args.size, "neighbors": NEIGHBORS, "rows": rows}))
        return
    print(f"| GiB of a process | state | {' | '.join(f'{batch} at once' for batch in args.batch)} |")
    print("| --- " * (2 + len(args.batch)) + "|")
    for row in rows:
        name = f"{row['parallel']}, {row['precision']}" + (", checkpointing" if row["activation_checkpointing"] else "")
        print(f"| {name} | {row['state_gib']} | {' | '.join(str(one) for one in row['gib'].values())} |")


if __name__ == "__main__":
    main()
