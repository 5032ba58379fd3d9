"""Puts a trained run into the package: the model, the small index inside it, and a card that says how it came to be.

python recipes/bundle.py recipes/runs/stickers FOLDER --hardware "…" --report evaluation.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from shutil import copyfile, copytree
from typing import Any

from knn_diffusion.checkpoint import atomic_folder
from knn_diffusion.diffusion.plan import SamplerConfig
from knn_diffusion.image_index import ImageIndex
from knn_diffusion.images import SourceImage, find_images
from knn_diffusion.model_folder import read_pipeline_file, write_pipeline_file
from knn_diffusion.models.encoders import load_encoder

LIMITS = [
    "It draws transparent stickers of 128 pixels in the styles of a few emoji families, one or two objects.",
    "Nothing else: no photographs, no letters, no faces of real people.",
    "The joint encoder was trained on images with captions and knows most concepts, as CLIP knows more than any generator. "
    "Tokenizer and denoiser never saw a caption, nor any image of the held-out concepts and of the held-out family.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder that recipes/stickers.sh filled")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--hardware", default="", help="what it was trained on, in words")
    parser.add_argument("--report", type=Path, help="report.json of knn-diffusion evaluate, for the card's scores")
    parser.add_argument("--guidance-scale", type=float, default=2.0, help="λ chosen on validation prompts")
    parser.add_argument("--k", type=int, default=7, help="neighbors, chosen likewise")
    parser.add_argument("--query-weight", type=float, default=1.0, help="share of the text in the query slot, likewise")
    options = parser.parse_args()
    with atomic_folder(options.bundle) as folder:
        for part in ("encoder", "tokenizer", "denoiser"):
            copytree(options.run / "denoiser" / "model" / part, folder / part)
        add_index(options.run / "pictures", folder)
        copyfile(options.run / "art" / "ATTRIBUTION.md", folder / "index" / "ATTRIBUTION.md")
        write_pipeline_file(
            folder,
            name="stickers",
            sampler=SamplerConfig(num_steps=16, order="halton", guidance_scale=options.guidance_scale),
            k=options.k,
            query_weight=options.query_weight,
            facts=facts(options),
        )
    print(f"{options.bundle}: {sum(f.stat().st_size for f in options.bundle.rglob('*')) / 2**20:.1f} MiB")
    print(read_pipeline_file(options.bundle).parts)


def add_index(pictures: Path, folder: Path) -> None:
    """Index the one-object pictures; each one's source is its file name, which says what it shows."""
    encoder = load_encoder(folder / "encoder")
    found = [SourceImage(image.key, image.key, image.load) for image in find_images([pictures])]
    with tempfile.TemporaryDirectory() as scratch:
        index = ImageIndex.build(found, Path(scratch) / "index", encoder)
        index.save(folder / "index", sealed=True)


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """What the card tells."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    trained = {part: trained_steps(options.run / part) for part in ("encoder", "tokenizer", "denoiser")}
    told: dict[str, Any] = {
        "license": "mit",
        "data": {
            "images": "composed from the families of recipes/fetch_art.py; ATTRIBUTION.md beside the index names them",
            "text tower": "all-MiniLM-L6-v2 (Apache-2.0), frozen, 8-bit",
        },
        "recipe": {
            "command": "recipes/stickers.sh",
            "commit": commit,
            "hardware": options.hardware or "not noted",
            **{f"{part}, steps": steps for part, steps in trained.items()},
        },
        "limits": LIMITS,
    }
    if options.report:
        told["scores"] = scores(json.loads(options.report.read_text(encoding="utf-8")))
    return told


def trained_steps(run: Path) -> int:
    """The last step in a training run's log."""
    return int(json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])["step"])


def scores(report: dict[str, Any]) -> dict[str, str]:
    """Each figure of an evaluation report with its 95 % interval."""
    found = {}
    for section in report["sections"]:
        for row in section["rows"]:
            estimate = row["estimate"]
            interval = f"{estimate['low']:.3g} … {estimate['high']:.3g}"
            found[f"{row['measure']}, {row['of']}"] = f"{estimate['value']:.3g} ({interval}, n = {estimate['count']})"
    return found


if __name__ == "__main__":
    main()
