"""Retrieval matters (Table 3 in small): FD∞ with 10 neighbors / FD∞ without is at most 0.6 (the paper: 16.66 / 38.2 = 0.44).

The models without neighbors are trained alike, at the same budget: on the plain embedding ("Without KNN", Sec. 4.4) and on
the LAFITE-noised one (Table 3). Each model's λ is chosen on validation captions. Beside the options of the model compared with:

    train denoiser … --set conditioning.k=0 --set conditioning.query_dropout=0 --set denoiser.query_dim=0 \\
        --set conditioning.query_noise=0        (or 0.75, as LAFITE)

    python benchmarks/retrieval_matters.py MODEL --without plain=DIR lafite=DIR [--size 1000] [--judge DIR] [--json]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

from knn_diffusion.evaluation import examiner as examining
from knn_diffusion.evaluation import protocols
from knn_diffusion.evaluation.metrics import Features
from knn_diffusion.evaluation.report import Section


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="model folder or bundled name, drawing from neighbors")
    parser.add_argument(
        "--without", nargs="+", required=True, metavar="NAME=DIR", help="models trained without neighbors"
    )
    parser.add_argument("--judge", type=Path, help="folder of the judge, instead of the bundled one")
    parser.add_argument("--size", type=int, default=1_000, help="pictures on each side of a distance")
    parser.add_argument("--validation-size", type=int, default=250, help="captions on which λ is chosen")
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 2, 3, 4, 6, 8], help="λ to choose from")
    parser.add_argument("-k", type=int, default=10, help="neighbors of the model that has them")
    parser.add_argument("--steps", type=int, help="passes through the denoiser")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    asked = parser.parse_args()
    started = time.monotonic()
    config = protocols.EvaluationConfig(num_distance=asked.size, num_steps=asked.steps)
    models = {f"{asked.k} neighbors": (asked.model, asked.k)}
    models |= {f"no neighbors, {name}": (folder, 0) for name, folder in (one.split("=", 1) for one in asked.without)}
    drawn: dict[str, Features] = {}
    sections: list[Section] = []
    for name, (folder, k) in models.items():
        examiner = protocols.prepare(folder, asked.judge, replace(config, k=k))
        choosing = replace(examiner, config=replace(examiner.config, num_distance=asked.validation_size))
        scale, chosen = protocols.choose_guidance(choosing, asked.scales)
        sections.append(replace(chosen, name=f"guidance-{k}", title=f"Guidance of the model with {name}"))
        drawn[name] = examining.drawn_features(examiner, examining.REFERENCE_SEED, guidance_scale=scale)
    rows = protocols.compare_distances(examiner, drawn, target="≤ 0.6")
    note = f"The same {asked.size} captions and seeds for every model, each at the λ chosen for it."
    sections.insert(0, Section(name="retrieval", title="Retrieval matters", note=note, rows=rows))
    report = protocols.report_of(examiner, sections, time.monotonic() - started)
    print(json.dumps(report.to_dict()) if asked.json else report.to_markdown())


if __name__ == "__main__":
    main()
