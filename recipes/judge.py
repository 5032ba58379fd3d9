"""Trains the judge that evaluations ask: python recipes/judge.py recipes/runs/judge [--max-minutes 9]; goes on where it stopped.

It draws its own pictures (60,000, two minutes), so it needs the emoji font. Copy RUN/model to
src/knn_diffusion/bundles/judge, or name it with `knn-diffusion evaluate --judge`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from knn_diffusion.training.judge import default_training, train_judge
from knn_diffusion.training.options import RunOptions, StepProgress


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--max-minutes", type=float)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()

    def watch(progress: StepProgress) -> None:
        if progress.step % 100 == 0:
            print(progress.step, {name: round(value, 3) for name, value in progress.metrics.items()}, flush=True)

    run = RunOptions(
        output=options.output, resume=True, max_minutes=options.max_minutes, device=options.device, watch=watch
    )
    print(train_judge(run, default_training(options.steps)))


if __name__ == "__main__":
    main()
