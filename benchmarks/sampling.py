"""Claim: at equal layers, width, tokens and steps, sampling is at least 1.8× as fast as diffusers' VQDiffusionPipeline.

    python benchmarks/sampling.py [--size tiny|small|paper] [--steps 16] [--peer-steps 100] [--batch 1] [--json]
    python benchmarks/sampling.py --size paper --steps 100 --compile
    python benchmarks/sampling.py --size paper --steps 16 --sweep --plot cost.png

Both systems have random weights and the same number of blocks, heads, tokens, codes and condition slots, and draw with
guidance (λ = 8), truncation off, ancestral order. Measured is everything between the condition and the tokens, per image: the
peer is driven through its own `VQDiffusionPipeline.__call__`, with a text encoder and an image decoder that cost nothing, so
that neither side's stands in the figure; what our own decoder takes is told beside it. The peer computes in float32, as it is
shipped; its time in bfloat16 stands beside, where ours is bfloat16 too. Runs of both alternate, and the fastest of each counts,
since a shared machine only ever adds time.

With --peer-steps 100 both draw what benchmarks/few_steps.py finds to be of equal quality: the peer's only order needs all
steps of the chain, which it skips without the exact posterior. The claim is then at least 6×.

The share of the machine's rate is what our matrix products, attention and convolutions compute in a run, as torch counts them
(two operations for a product and its sum), by the time of the whole run, against the best square matrix product in the same
arithmetic. --compile draws with a compiled pass of the sampler; what the first run takes longer for it stands apart. --sweep
measures ours alone, one thing changed at a time: steps, batch, tokens, neighbors.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from speed.machine import commit, fastest, hardware, matmul_rate, operations, peak_bytes
from speed.ours import GUIDANCE_SCALE, SIZES, Draw, decoder_run, our_run
from speed.peer import peer_run

from knn_diffusion.device import choose_device, choose_dtype
from knn_diffusion.diffusion.compiled import CompiledStep
from knn_diffusion.diffusion.step import Step, reverse_step

SWEPT: dict[str, tuple[int, ...]] = {
    "steps": (4, 8, 16, 32, 64, 100),
    "batch": (1, 2, 4, 8, 16),
    "tokens": (64, 256, 1024),
    "neighbors": (0, 5, 10, 20),
}


def measured(
    draw: Draw, device: torch.device, dtype: torch.dtype, rate: float, repeats: int, step: Step
) -> dict[str, Any]:
    """Our figures, an image."""
    work = operations(partial(our_run(draw, device, dtype), 0))
    run = our_run(draw, device, dtype, step)
    started = time.perf_counter()
    run(0)
    first = time.perf_counter() - started
    seconds = fastest({"ours": run}, repeats)["ours"]
    return {
        "first_run_extra_seconds": round(first - seconds, 3),
        "seconds_per_image": round(seconds / draw.batch, 5),
        "operations_per_image": work // draw.batch,
        "share_of_matmul_rate": round(work / seconds / rate, 3),
        "peak_mib": round(peak_bytes(device) / 2**20),
    }


def compared(
    draw: Draw, peer_steps: int, device: torch.device, dtype: torch.dtype, repeats: int, step: Step
) -> dict[str, float]:
    """Seconds an image of both systems, taken in turns."""
    peer = partial(peer_run, draw.config, peer_steps, device, slots=1 + draw.neighbors, guidance_scale=GUIDANCE_SCALE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peer's own deprecated parts
        runs: dict[str, Callable[[int], Any]] = {
            "ours": our_run(draw, device, dtype, step),
            "peer": peer(torch.float32),
        }
        if dtype != torch.float32:
            runs["peer_same_precision"] = peer(dtype)
        return fastest(runs, repeats)


def swept(draw: Draw, thing: str, value: int) -> Draw:
    """The same with one thing changed."""
    return draw.with_grid(int(value**0.5)) if thing == "tokens" else replace(draw, **{thing: value})


def sweep(draw: Draw, measure: Callable[[Draw], dict[str, Any]]) -> list[dict[str, Any]]:
    """Our figures with one thing changed at a time, each printed as it comes."""
    rows = []
    print(f"{'':>10} {'':>6} {'s an image':>11} {'TFLOP':>8} {'share':>6} {'peak MiB':>9}")
    for thing, values in SWEPT.items():
        for value in values:
            rows.append({"changed": thing, "value": value, **measure(swept(draw, thing, value))})
            found = rows[-1]
            print(
                f"{thing:>10} {value:6} {found['seconds_per_image']:11.4f} {found['operations_per_image'] / 1e12:8.4f} "
                f"{found['share_of_matmul_rate']:6.0%} {found['peak_mib']:9,}",
                flush=True,
            )
    return rows


def plotted(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds an image against each thing that was changed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3), layout="constrained")
    for axes, thing in zip(figure.subplots(1, len(SWEPT), sharey=True), SWEPT, strict=True):
        points = [(row["value"], row["seconds_per_image"]) for row in rows if row["changed"] == thing]
        axes.plot(*zip(*points, strict=True), marker="o")
        axes.set(xlabel=thing, ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("seconds an image")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=1, help="images that we draw together; the peer draws one")
    parser.add_argument("--peer-steps", type=int, help="steps of the peer; as many as ours by default")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true", help="compile a pass of ours")
    parser.add_argument("--sweep", action="store_true", help="ours alone, over steps, batch, tokens and neighbors")
    parser.add_argument("--plot", type=Path, help="draw the sweep into this file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    device = choose_device(args.device)
    dtype, peer_steps = choose_dtype(device), args.peer_steps or args.steps
    draw = Draw(config=SIZES[args.size], steps=args.steps, batch=args.batch)
    rate = matmul_rate(device, dtype)
    step = CompiledStep(device) if args.compile else reverse_step
    measure = partial(measured, device=device, dtype=dtype, rate=rate, repeats=args.repeats, step=step)
    report = {
        "commit": commit(),
        "hardware": hardware(device),
        "torch": torch.__version__,
        "precision": str(dtype).removeprefix("torch."),
        "matmul_tflops": round(rate / 1e12, 3),
        "size": args.size,
        "depth": draw.config.depth,
        "width": draw.config.width,
        "tokens": draw.config.seq,
        "vocab_size": draw.config.vocab_size,
        "slots": 1 + draw.neighbors,
        "steps": draw.steps,
        "batch": draw.batch,
        "compiled": args.compile,
    }
    if args.sweep:
        report["sweep"] = sweep(draw, measure)
        if args.plot:
            plotted(report["sweep"], args.plot)
    else:
        report |= {f"our_{name}": value for name, value in measure(draw).items()}
        decoding = fastest({"decoder": decoder_run(draw, device)}, args.repeats)["decoder"] / draw.batch
        report["our_decoder_seconds_per_image"] = round(decoding, 5)
        seconds = compared(draw, peer_steps, device, dtype, args.repeats, step)
        report["peer"] = f"diffusers {version('diffusers')} VQDiffusionPipeline, {peer_steps} steps, one image"
        report |= {f"{name}_seconds": round(value, 4) for name, value in seconds.items()}
        report["ratio"] = round(draw.batch * seconds["peer"] / seconds["ours"], 2)
    if args.json:
        print(json.dumps(report))
        return
    for name, value in report.items():
        if name != "sweep":
            print(f"{name:26} {value}")


if __name__ == "__main__":
    main()
