"""The card of a model: Markdown for people, with the head of YAML by which the Hugging Face hub finds and shows a model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from knn_diffusion.diffusion.plan import SamplerConfig

TAGS = ("knn-diffusion", "retrieval", "discrete-diffusion")
PAPER = "https://arxiv.org/abs/2204.02849"
"""The hub reads this link and shows the model on the paper's page."""


def model_card(name: str, sampler: SamplerConfig, k: int, parts: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    """The card, from the facts: a fact that is a mapping becomes a table, a list becomes a list.

    Args:
        parts: digest of each part's weights.
        facts: what is known of the model; `license` is the hub's short name of one, such as mit or cc-by-4.0.
    """
    lines = [
        *_head(str(facts.get("license", "mit"))),
        "",
        f"# {name}",
        "",
        f"A KNN-Diffusion model ([paper]({PAPER})). `KnnDiffusion.from_pretrained(...)` draws {sampler.num_steps} steps at "
        f"guidance {sampler.guidance_scale:g} with {k} neighbors.",
    ]
    for title, fact in facts.items():
        if title == "license":
            continue
        lines += ["", f"## {title.replace('_', ' ').capitalize()}", ""]
        if isinstance(fact, dict):
            lines += ["| | |", "| --- | --- |", *(f"| {one} | {value} |" for one, value in fact.items())]
        elif isinstance(fact, list):
            lines += [f"- {item}" for item in fact]
        else:
            lines.append(str(fact))
    lines += ["", "## Parts", "", *(f"- {part}: `{digest[:16]}`" for part, digest in parts.items())]
    return "\n".join(lines) + "\n"


def _head(license_name: str) -> list[str]:
    """The hub knows licenses by short names; any other is `other`, with its own name beside it."""
    short = re.fullmatch(r"[a-z0-9.+-]+", license_name) is not None
    license_lines = (
        [f"license: {license_name}"] if short else ["license: other", f"license_name: {json.dumps(license_name)}"]
    )
    tags = ["tags:", *(f"- {tag}" for tag in TAGS)]
    return ["---", *license_lines, "library_name: knn-diffusion", "pipeline_tag: text-to-image", *tags, "---"]
