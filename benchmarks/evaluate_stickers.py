"""Understands text, draws what is asked, adapts without training: the protocols on one model, with guidance chosen first.

python benchmarks/evaluate_stickers.py stickers --size 200 [--judge DIR] [--output DIR] [--choose-guidance] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from knn_diffusion.evaluation import protocols


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="stickers", help="bundled name or model folder")
    parser.add_argument("--judge", type=Path, help="folder of the judge, instead of the bundled one")
    parser.add_argument("--size", type=int, default=200, help="prompts of the judged protocols")
    parser.add_argument("--distance-size", type=int, default=1_000, help="pictures on each side of a distance")
    parser.add_argument("--only", nargs="*", choices=list(protocols.PROTOCOLS), help="protocols, all by default")
    parser.add_argument("--steps", type=int, help="passes through the denoiser")
    parser.add_argument("--choose-guidance", action="store_true", help="choose λ on validation captions first")
    parser.add_argument("--output", type=Path, help="folder for report.md, report.json and pictures.png")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    asked = parser.parse_args()
    config = protocols.EvaluationConfig(num_prompts=asked.size, num_distance=asked.distance_size, num_steps=asked.steps)
    started = time.monotonic()
    examiner = protocols.prepare(asked.model, asked.judge, config)
    sections = []
    if asked.choose_guidance:
        scale, section = protocols.choose_guidance(examiner)
        examiner = replace(examiner, config=replace(config, guidance_scale=scale))
        sections.append(section)
    sections += [protocols.PROTOCOLS[name](examiner, asked.output) for name in asked.only or protocols.PROTOCOLS]
    report = protocols.report_of(examiner, sections, time.monotonic() - started)
    if asked.output:
        report.save(asked.output)
    print(json.dumps(report.to_dict()) if asked.json else report.to_markdown())


if __name__ == "__main__":
    main()
