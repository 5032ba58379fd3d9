"""What is asked of a model, with which prompts, seeds and references, and the report of its answers.

Five protocols: does retrieval understand everyday words; is the thing drawn that was asked for; can it be drawn after its
pictures were only added to the index; how far is the distribution of drawn pictures from that of real ones; and a sheet to
look at. Everything random follows from one seed. The joint encoder may know every concept, as CLIP does; tokenizer,
denoiser and index have never seen the held-out ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from knn_diffusion import images, stickers
from knn_diffusion.errors import UsageError
from knn_diffusion.evaluation.examiner import (
    ADDED_SEED,
    CEILING_SEED,
    REFERENCE_SEED,
    VALIDATION_SEED,
    EvaluationConfig,
    Examiner,
    Pictures,
    Pipe,
    Prompt,
    bootstrap,
    distance_row,
    distance_scenes,
    drawn_features,
    extended,
    has_index,
    nearest_sources,
    reference_features,
    scenes_of,
    shown_in,
    unbiased_rows,
)
from knn_diffusion.evaluation.metrics import Features, ratio_estimate, share, top_k_accuracy, top_k_hits
from knn_diffusion.evaluation.report import Report, Row, Section, circumstances
from knn_diffusion.models.judge import judge_digest, load_judge
from knn_diffusion.progress import Progress
from knn_diffusion.randomness import derive_seed
from knn_diffusion.stickers.dataset import NamedGlyphs

__all__ = [
    "PROTOCOLS",
    "EvaluationConfig",
    "Examiner",
    "choose_guidance",
    "compare_distances",
    "evaluate",
    "prepare",
    "report_of",
]

ENCODER_NOTE = "The joint encoder may know every concept; tokenizer, denoiser and index never saw the held-out ones."
TOP_K = 5
"""Answers of the judge among which the concept asked for counts as recognised."""

JUDGE_FOLDER = Path(__file__).parents[1] / "bundles" / "judge"


def evaluate(
    model: str | Path | Pipe,
    judge_folder: str | Path | None = None,
    output: str | Path | None = None,
    *,
    only: str | Collection[str] | None = None,
    num_prompts: int | None = None,
    progress: Progress | None = None,
    config: EvaluationConfig | None = None,
    glyphs: NamedGlyphs | None = None,
) -> Report:
    """Run protocols on a model; with `output` also write report.json, report.md and the pictures there, after each protocol.

    Args:
        model: a bundled name, a model folder, or a loaded pipeline.
        judge_folder: the judge; by default the one beside the bundled models.
        only: names of protocols; by default all, for a model without an index all that need none.
        num_prompts: prompts of the judged protocols and pictures of the distance, in place of the configuration's.

    Raises: UsageError for an unknown protocol, or one that needs an index where there is none; MissingDependencyError without the emoji font; CheckpointError for a
        missing judge or model.
    """
    names = _chosen(only)
    settings = EvaluationConfig() if config is None else config
    if num_prompts is not None:
        settings = replace(settings, num_prompts=num_prompts, num_distance=max(2, num_prompts))
    examiner = prepare(model, judge_folder, settings, progress=progress, glyphs=glyphs)
    if not has_index(examiner.pipe):
        names = _without_index(names, asked=only is not None)
    place = None if output is None else Path(output)
    started = time.monotonic()
    report = report_of(examiner, [], 0.0)
    for name in names:
        sections = [*report.sections, PROTOCOLS[name](examiner, place)]
        report = report_of(examiner, sections, time.monotonic() - started)
        if place is not None:
            report.save(place)
    return report


def prepare(
    model: str | Path | Pipe,
    judge_folder: str | Path | None = None,
    config: EvaluationConfig | None = None,
    *,
    progress: Progress | None = None,
    glyphs: NamedGlyphs | None = None,
) -> Examiner:
    """Model, judge and font, ready for any protocol; arguments and errors as for `evaluate`."""
    source = stickers.FontGlyphs() if glyphs is None else glyphs
    return Examiner(
        pipe=_loaded(model),
        judge=load_judge(JUDGE_FOLDER if judge_folder is None else Path(judge_folder)),
        config=EvaluationConfig() if config is None else config,
        glyphs=source,
        progress=progress or (lambda what, done, total: None),
    )


def report_of(examiner: Examiner, sections: list[Section], seconds: float) -> Report:
    """The sections with everything needed to measure them again."""
    return Report(facts=_facts(examiner, seconds), sections=sections)


def understands_text(examiner: Examiner, output: Path | None = None) -> Section:
    """Everyday words that are no concept's name: does one of the five nearest images show what the word may mean?"""
    known = {concept.name: concept for concept in examiner.known}
    words = {
        word: [name for name in names if name in known and not known[name].held_out]
        for word, names in stickers.everyday_words().items()
    }
    asked = {word: names for word, names in words.items() if names}
    answers: dict[str, dict[str, Any]] = {}
    for number, (word, names) in enumerate(asked.items()):
        found = [shown_in(source, known) for source in nearest_sources(examiner.pipe, word, 5)]
        answers[word] = {"means": names, "found": [sorted(shown) for shown in found]}
        answers[word]["right"] = any(set(names) & shown for shown in found)
        examiner.progress("asking everyday words", number + 1, len(asked))
    right = share([answer["right"] for answer in answers.values()])
    note = f"{len(asked)} everyday words that are no concept's name; held-out concepts left aside."
    row = Row(measure="right concept among the 5 nearest", of="retrieval", estimate=right, target="≥ 80 %")
    return Section(name="understands", title="Understands text", note=note, rows=[row], details=answers)


def draws_what_is_asked(examiner: Examiner, output: Path | None = None) -> Section:
    """Prompts for one object on a coloured background: does the judge see the object and the colour in the answer?"""
    prompts = stickers.evaluation_prompts(examiner.config.seed, examiner.config.num_prompts, "train", examiner.known)
    labels = _labels(examiner, prompts)  # a judge that lacks one is an error before the work
    drawn, retrieved = examiner.draw([text for text, _, _ in prompts], "drawing what is asked")
    real = examiner.render(scenes_of(prompts, examiner.config.seed))
    answers = {
        "generated": drawn,
        "retrieval alone": retrieved,
        "tokenizer reconstructions": examiner.reconstruct(real),
        "real renders": real,
    }
    rows: list[Row] = []
    for of, pictures in answers.items():
        if len(pictures) == len(prompts):
            rows += _judged_rows(examiner, of, pictures, prompts, aimed=of == "generated")
    note = (
        f"{len(prompts)} one-object prompts such as “{prompts[0][0]}”, one picture each. Retrieval alone answers with the "
        f"nearest image. Reconstructions and real renders are the ceilings of tokenizer and judge. {ENCODER_NOTE}"
    )
    verdict = examiner.opinion(drawn)
    hits = top_k_hits(verdict.concept, labels, TOP_K)
    details = {"missed": [prompts[number][0] for number in np.flatnonzero(~hits)]}
    return Section(name="draws", title="Draws what is asked", note=note, rows=rows, details=details)


def adapts(examiner: Examiner, output: Path | None = None) -> Section:
    """Held-out concepts before and after their pictures were added to the index, with the same weights and seeds."""
    config = examiner.config
    prompts = stickers.evaluation_prompts(config.seed, config.num_prompts, "held-out", examiner.known)
    texts, labels = [text for text, _, _ in prompts], _labels(examiner, prompts)
    before, before_retrieved = examiner.draw(texts, "drawing unseen concepts, before")
    own = examiner.pipe.index
    added = _held_out_pictures(examiner, {concept for _, concept, _ in prompts})
    examiner.pipe.index = extended(own, added)
    try:
        after, after_retrieved = examiner.draw(texts, "drawing unseen concepts, after")
    finally:
        examiner.pipe.index = own
    real = examiner.render(scenes_of(prompts, config.seed))
    answers = {
        ("generated, before", "≤ 25 %"): before,
        ("generated, after", "≥ 60 %"): after,
        ("retrieval alone, before", ""): before_retrieved,
        ("retrieval alone, after", ""): after_retrieved,
        ("tokenizer reconstructions", ""): examiner.reconstruct(real),
        ("real renders", ""): real,
    }
    rows = [
        Row(
            measure=f"concept, top-{TOP_K}",
            of=of,
            estimate=top_k_accuracy(examiner.opinion(p).concept, labels, TOP_K),
            target=target,
        )
        for (of, target), p in answers.items()
        if len(p) == len(prompts)
    ]
    note = (
        f"{len(prompts)} prompts for held-out concepts; {len(added)} pictures of them ({config.pictures_added} each) were "
        f"added to the index, no weight was changed. {ENCODER_NOTE}"
    )
    return Section(name="adapts", title="Adapts without training", note=note, rows=rows)


def frechet(examiner: Examiner, output: Path | None = None) -> Section:
    """How far drawings of captions are from unseen real pictures in the judge's features, beside reconstructions and real ones.

    FD∞ and KID are against renders of other scenes. The plain distance is against renders of the very scenes, as in earlier reports:
    it shares their sampling error, so it mixes how well captions are followed into how good pictures look.
    """
    drawn = drawn_features(examiner, REFERENCE_SEED)
    real = examiner.render(distance_scenes(examiner, REFERENCE_SEED))
    scenes = examiner.opinion(real).features
    rebuilt = examiner.opinion(examiner.reconstruct(real)).features
    others = reference_features(examiner, CEILING_SEED)
    rows = [
        distance_row("generated", drawn, scenes, examiner.config),
        distance_row("tokenizer reconstructions", rebuilt, scenes, examiner.config),
    ]
    for of, features in {"generated": drawn, "tokenizer reconstructions": rebuilt, "real renders": scenes}.items():
        rows += unbiased_rows(of, features, others, examiner.config)
    note = (
        f"Drawings for the captions of {len(scenes)} unseen scenes; reconstructions and real renders of the same scenes. Fréchet "
        f"distance: against these scenes as rendered, biased. FD∞ and KID: against {len(others)} renders of other scenes, where real "
        "renders are at 0 up to their interval."
    )
    return Section(name="frechet", title="Distances in the judge's features", note=note, rows=rows)


def pictures(examiner: Examiner, output: Path | None = None, count: int = 10) -> Section:
    """A sheet of prompts with what was retrieved, drawn and real, saved as pictures.png."""
    prompts = stickers.evaluation_prompts(derive_seed(examiner.config.seed, "sheet"), count, "train", examiner.known)
    drawn, retrieved = examiner.draw([text for text, _, _ in prompts], "drawing a sheet")
    real = examiner.render(scenes_of(prompts, examiner.config.seed))
    columns = [column for column in (retrieved, drawn, real) if len(column) == len(prompts)]
    cells = [picture for row in zip(*columns, strict=True) for picture in row]
    labels = [text for text, _, _ in prompts for _ in columns]
    if output is not None:
        sheet = images.grid(cells, columns=len(columns), cell=128, labels=labels)
        images.save_png(sheet, output / "pictures.png", None)
    note = "pictures.png: each row a prompt; from left to right the image retrieved first, the drawing, a real render."
    return Section(name="pictures", title="Pictures", note=note, rows=[], details={"prompts": [p[0] for p in prompts]})


PROTOCOLS: dict[str, Callable[[Examiner, Path | None], Section]] = {
    "understands": understands_text,
    "draws": draws_what_is_asked,
    "adapts": adapts,
    "frechet": frechet,
    "pictures": pictures,
}
OF_INDEX = ("understands", "adapts")
"""Protocols about what is retrieved."""


def choose_guidance(
    examiner: Examiner, scales: Sequence[float] = (1.0, 2.0, 3.0, 4.0, 6.0, 8.0), **changed: Any
) -> tuple[float, Section]:
    """The guidance scale with the least distance on validation captions, which no other protocol uses.

    The paper chose its λ = 8 by FID in the same way (Sec. 3.2).
    """
    reference = reference_features(examiner, VALIDATION_SEED)
    rows = []
    for scale in scales:
        drawn = drawn_features(examiner, VALIDATION_SEED, **changed | {"guidance_scale": scale})
        rows.append(distance_row(f"guidance {scale:g}", drawn, reference, examiner.config))
    best = scales[int(np.argmin([row.estimate.value for row in rows]))]
    note = f"Chosen: guidance {best:g}, by the distance on {len(reference)} validation captions."
    return best, Section(name="guidance", title="Guidance", note=note, rows=rows, details={"chosen": best})


def compare_distances(examiner: Examiner, answers: dict[str, Features], target: str = "") -> list[Row]:
    """FD∞ of several sets of drawings of the same captions from renders of other scenes, and the ratio of the first to each other.

    A ratio of plain Fréchet distances is drawn towards 1 by the bias they share.
    """
    reference = reference_features(examiner, CEILING_SEED)
    draws = {of: bootstrap(features, reference, examiner.config) for of, features in answers.items()}
    pairs = {of: unbiased_rows(of, features, reference, examiner.config, draws[of]) for of, features in answers.items()}
    rows = [row for pair in pairs.values() for row in pair]
    first, *others = answers
    for other in others:
        above, below = (pairs[of][0].estimate.value for of in (first, other))
        estimate = ratio_estimate(above, below, draws[first], draws[other], len(reference))
        of = f"{first} / {other}"
        rows.append(Row(measure="ratio of FD∞", of=of, estimate=estimate, unit="ratio", target=target))
    return rows


def _judged_rows(examiner: Examiner, of: str, answers: Pictures, prompts: Sequence[Prompt], aimed: bool) -> list[Row]:
    verdict = examiner.opinion(answers)
    colours = np.array([examiner.judge.config.colours.index(colour) for _, _, colour in prompts])
    labels = _labels(examiner, prompts)
    target = "≥ 85 %" if aimed else ""
    return [
        Row(
            measure=f"concept, top-{TOP_K}",
            of=of,
            estimate=top_k_accuracy(verdict.concept, labels, TOP_K),
            target=target,
        ),
        Row(measure="concept, top-1", of=of, estimate=top_k_accuracy(verdict.concept, labels, 1)),
        Row(measure="background colour", of=of, estimate=top_k_accuracy(verdict.colour, colours, 1), target=target),
    ]


def _labels(examiner: Examiner, prompts: Sequence[Prompt]) -> np.ndarray:
    place = {name: number for number, name in enumerate(examiner.judge.config.concepts)}
    unknown = [concept.name for _, concept, _ in prompts if concept.name not in place]
    if unknown:
        raise UsageError(f"expected a judge that knows every concept, it lacks {unknown[0]!r}: train the judge again")
    return np.array([place[concept.name] for _, concept, _ in prompts])


def _held_out_pictures(examiner: Examiner, concepts: Collection[stickers.Concept]) -> dict[str, Image.Image]:
    """Renders of held-out concepts on varied backgrounds, by a source that carries the concept's name."""
    scenes = {
        f"added/{concept.name} {number}": stickers.one_object_scene(
            concept,
            stickers.COLOURS[number % len(stickers.COLOURS)],
            derive_seed(ADDED_SEED, concept.name, number),
            background=stickers.BACKGROUNDS[number % len(stickers.BACKGROUNDS)],
            outlined=number % 2 == 1,
        )
        for concept in sorted(concepts, key=lambda concept: concept.name)
        for number in range(examiner.config.pictures_added)
    }
    return dict(zip(scenes, examiner.render(list(scenes.values())), strict=True))


def _chosen(only: str | Collection[str] | None) -> list[str]:
    names = list(PROTOCOLS) if only is None else [only] if isinstance(only, str) else list(only)
    for name in names:
        if name not in PROTOCOLS:
            raise UsageError(f"expected a protocol ({', '.join(PROTOCOLS)}), got {name!r}: choose one of them")
    return names


def _without_index(names: list[str], *, asked: bool) -> list[str]:
    """The protocols that a model without an index can be put to."""
    needing = [name for name in names if name in OF_INDEX]
    if needing and asked:
        raise UsageError(
            f"expected a model with an index for {' and '.join(needing)}, it has none: name one (--index), or ask for other "
            "protocols"
        )
    return [name for name in names if name not in OF_INDEX]


def _loaded(model: str | Path | Pipe) -> Pipe:
    if not isinstance(model, str | Path):
        return model
    from knn_diffusion.pipeline import KnnDiffusion

    return cast(Pipe, KnnDiffusion.from_pretrained(model))


def _facts(examiner: Examiner, seconds: float) -> dict[str, Any]:
    model = examiner.pipe.model
    return {
        "model": getattr(model, "name", "unnamed"),
        "split digest": stickers.split_digest(),
        "glyphs": examiner.glyphs.digest[:16],
        "judge": judge_digest(examiner.judge),
        "settings": {name: value for name, value in asdict(examiner.config).items() if value is not None},
        "images in the index": len(examiner.pipe.index) if has_index(examiner.pipe) else "it has none",
        "note": ENCODER_NOTE,
        **circumstances(),
        "seconds": round(seconds, 1),
    }
