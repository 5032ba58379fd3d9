"""Few steps: FD∞ (the Fréchet distance without bias) at 16 steps is within 5 % of that at 100.

python benchmarks/few_steps.py stickers --size 1000 [--steps 16 100] [--sampler halton] [--judge DIR] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from knn_diffusion.evaluation import examiner as examining
from knn_diffusion.evaluation import protocols
from knn_diffusion.evaluation.report import Section


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="stickers", help="bundled name or model folder")
    parser.add_argument("--judge", type=Path, help="folder of the judge, instead of the bundled one")
    parser.add_argument("--size", type=int, default=1_000, help="pictures on each side of a distance")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[16, 100], help="passes; each is compared with the first"
    )
    parser.add_argument("--sampler", help="ancestral, halton or confidence; the model's own by default")
    parser.add_argument("--guidance-scale", type=float, help="λ; the model's own by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    asked = parser.parse_args()
    config = protocols.EvaluationConfig(num_distance=asked.size, guidance_scale=asked.guidance_scale)
    examiner = protocols.prepare(asked.model, asked.judge, config)
    started = time.monotonic()
    settings: dict[str, Any] = {} if asked.sampler is None else {"sampler": asked.sampler}
    drawn = {
        f"{steps} steps": examining.drawn_features(
            examiner, examining.REFERENCE_SEED, num_inference_steps=steps, **settings
        )
        for steps in asked.steps
    }
    rows = protocols.compare_distances(examiner, drawn, target="≤ 1.05")
    note = f"The same {asked.size} captions and seeds at every number of steps."
    section = Section(name="few-steps", title="Few steps", note=note, rows=rows)
    report = protocols.report_of(examiner, [section], time.monotonic() - started)
    print(json.dumps(report.to_dict()) if asked.json else report.to_markdown())


if __name__ == "__main__":
    main()
