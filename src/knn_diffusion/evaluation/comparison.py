"""`evaluate images`: how far drawn pictures are from real ones, in eight figures, and what must be known to read them.

FD is comparable with the literature and biased; FD∞ and KID decide. CMMD sees means alone. Precision and density ask whether
drawings look real, recall and coverage whether they vary as the real ones do.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from knn_diffusion.config import config, require
from knn_diffusion.errors import UsageError
from knn_diffusion.evaluation.features import FeatureExtractor
from knn_diffusion.evaluation.frechet import (
    LEAST,
    bootstrap_frechet,
    bootstrap_infinity,
    fit_items,
    frechet_distance,
    frechet_infinity,
)
from knn_diffusion.evaluation.kernels import cmmd, kid
from knn_diffusion.evaluation.manifolds import overlap
from knn_diffusion.evaluation.metrics import Estimate, Features, bootstrap_estimate
from knn_diffusion.evaluation.report import Report, Row, Section, Unit, circumstances
from knn_diffusion.evaluation.sides import (
    JPEG,
    Side,
    identity,
    is_feature_file,
    read_features,
    read_pictures,
    save_features,
)
from knn_diffusion.progress import Progress

WIDE = 512
"""Features wider than this are resampled less often: every draw costs the cube of the width."""
RESAMPLES, RESAMPLES_WIDE = 100, 20
STEPS = 5
"""Of progress while measuring."""
SHARED_SIZE = 0.9
"""Share of pictures that must have one size for a side to count as of that size."""


@config
class ComparisonConfig:
    """How sets are compared."""

    resamples: int | None = None
    """Bootstrap draws behind the intervals of FD and FD∞; None takes 100, or 20 for features wider than 512."""
    k: int = 3
    """Neighbor that the balls of precision and recall reach to."""
    k_density: int = 5
    """The same for density and coverage."""
    seed: int = 0
    """Of resampling and parts."""

    def __post_init__(self) -> None:
        require(self.resamples is None or self.resamples >= 10, "resamples", self.resamples, "at least 10")
        require(self.k >= 1, "k", self.k, "at least 1")
        require(self.k_density >= 1, "k_density", self.k_density, "at least 1")


def compare(
    drawn: str | Path,
    reference: str | Path,
    extractor: FeatureExtractor | None = None,
    output: str | Path | None = None,
    *,
    settings: ComparisonConfig | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compare two sets of pictures in the features of one network.

    Args:
        drawn: a folder, tar shard or parquet table of pictures, or a feature file.
        reference: the same, of real pictures; not those that the drawings were asked to show.
        extractor: needed unless both sides are feature files.
        output: where report.json, report.md and the features of both sides are written.

    Raises: UsageError when a side is missing, has fewer than 10 pictures, or was seen by another network than the other.
    """
    show = progress or (lambda what, done, total: None)
    started = time.monotonic()
    sides = _read(drawn, extractor, show), _read(reference, extractor, show)
    place = None if output is None else Path(output)
    if place is not None:  # the dear part, kept whatever comes
        for side, name in zip(sides, ("drawn", "reference"), strict=True):
            save_features(place / f"{name}.npz", side)
    section = compare_sides(*sides, settings or ComparisonConfig(), show)
    facts = {
        **{
            name: f"{side.name}, {len(side.features):,} pictures"
            for name, side in zip(("drawn", "reference"), sides, strict=True)
        },
        "features": _network(*sides) or "not named in the files",
        **circumstances(),
        "seconds": round(time.monotonic() - started, 1),
    }
    report = Report(facts=facts, sections=[section], title=f"{sides[0].name} against {sides[1].name}")
    if place is not None:
        report.save(place)
    return report


def compare_sides(drawn: Side, reference: Side, settings: ComparisonConfig, progress: Progress) -> Section:
    """The figures of two sets, with notices on what makes them unsafe.

    Raises: UsageError as `compare`.
    """
    _check(drawn, reference)
    rows = [
        Row(measure=measure, of=f"{drawn.name} against {reference.name}", estimate=estimate, unit=unit)
        for measure, (estimate, unit) in measures(drawn.features, reference.features, settings, progress).items()
    ]
    width = drawn.features.shape[1]
    found = notices(drawn, reference)
    note = (
        f"{len(drawn.features):,} drawn and {len(reference.features):,} reference pictures, {width} features of "
        f"{_network(drawn, reference) or 'an unnamed network'}. FD∞ and KID are without the bias of small counts; precision to "
        "coverage are of equal counts."
    )
    title = f"Distances in {width} features"
    return Section(name="images", title=title, note=" ".join([note, *found]), rows=rows, details={"notices": found})


def measures(
    drawn: Features, reference: Features, settings: ComparisonConfig, progress: Progress
) -> dict[str, tuple[Estimate, Unit]]:
    """The eight figures of two sets of features, by their names."""
    count = min(len(drawn), len(reference))
    draws = settings.resamples or (RESAMPLES if drawn.shape[1] <= WIDE else RESAMPLES_WIDE)
    sampling = {"num_resamples": draws, "seed": settings.seed}
    made: dict[str, tuple[Estimate, Unit]] = {}
    value = frechet_distance(drawn, reference)
    made["FD"] = bootstrap_estimate(value, bootstrap_frechet(drawn, reference, **sampling), count), "distance"
    progress("measuring", 1, STEPS)
    value = frechet_infinity(drawn, reference, seed=settings.seed)
    made["FD∞"] = bootstrap_estimate(value, bootstrap_infinity(drawn, reference, **sampling), count), "distance"
    progress("measuring", 2, STEPS)
    made["KID"] = kid(drawn, reference).estimate, "distance"
    progress("measuring", 3, STEPS)
    made["CMMD"] = cmmd(drawn, reference).estimate, "distance"
    progress("measuring", 4, STEPS)
    rng = np.random.default_rng(settings.seed)
    sides = (side[np.sort(rng.permutation(len(side))[:count])] for side in (drawn, reference))
    found = overlap(*sides, k=settings.k, k_density=settings.k_density)
    made["precision"], made["recall"] = (found.precision, "share"), (found.recall, "share")
    made["density"], made["coverage"] = (found.density, "ratio"), (found.coverage, "share")
    progress("measuring", 5, STEPS)
    return made


def notices(drawn: Side, reference: Side) -> list[str]:
    """What a reader must know before the figures are believed, a sentence each."""
    sides = {"drawn": drawn, "reference": reference}
    found = []
    for name, side in sides.items():
        if side.skipped:
            found.append(f"{len(side.skipped)} {name} pictures could not be read (first: {side.skipped[0]}).")
    jpeg = {name: side.formats[JPEG] / max(1, side.formats.total()) for name, side in sides.items() if side.formats}
    if len(jpeg) == 2 and abs(jpeg["drawn"] - jpeg["reference"]) > 0.1:
        shares = " and ".join(f"{100 * share:.0f} % of the {name} pictures" for name, share in jpeg.items())
        found.append(f"{shares} are JPEG by their names: its traces alone move distances, save both sides alike.")
    sizes = {name: _size(side) for name, side in sides.items() if side.sizes}
    if len(set(sizes.values())) > 1 or "mixed sizes" in sizes.values():
        said = ", ".join(f"{name} {size}" for name, size in sizes.items())
        found.append(f"The sizes in pixels differ ({said}): distances then measure sharpness too.")
    count, width = min(len(side.features) for side in sides.values()), drawn.features.shape[1]
    if count < fit_items(width):
        found.append(
            f"{count:,} pictures are few for {width} features: FD∞ is rough below {fit_items(width):,}, rely on KID."
        )
    if drawn.features.shape == reference.features.shape and np.array_equal(drawn.features, reference.features):
        found.append("Both sides are the same pictures: the figures say nothing.")
    if not (drawn.extractor and reference.extractor):
        found.append("A feature file does not name its network: make sure that one network made both sides.")
    return found


def _read(place: str | Path, extractor: FeatureExtractor | None, progress: Progress) -> Side:
    if is_feature_file(place):
        side = read_features(place)
        if extractor is not None and side.extractor and side.extractor != identity(extractor):
            raise UsageError(
                f"expected features of {identity(extractor)}, {place} holds those of {side.extractor}: "
                "choose that network (--features, --weights) or give the pictures"
            )
        return side
    if extractor is None:
        raise UsageError(f"expected a network to look at the pictures of {place}, got none: choose one (--features)")
    return read_pictures(place, extractor, progress)


def _check(drawn: Side, reference: Side) -> None:
    for side in (drawn, reference):
        if len(side.features) < LEAST:
            raise UsageError(
                f"expected at least {LEAST} pictures on each side, {side.name} has {len(side.features)}: add pictures"
            )
    if drawn.extractor and reference.extractor and drawn.extractor != reference.extractor:
        raise UsageError(
            f"expected features of one network, {drawn.name} is of {drawn.extractor} and {reference.name} of "
            f"{reference.extractor}: make one of them anew"
        )
    if drawn.features.shape[1] != reference.features.shape[1]:
        raise UsageError(
            f"expected features of one width, {drawn.name} has {drawn.features.shape[1]} and {reference.name} "
            f"{reference.features.shape[1]}: make one of them anew with the other's network"
        )


def _network(drawn: Side, reference: Side) -> str:
    return drawn.extractor or reference.extractor


def _size(side: Side) -> str:
    (width, height), count = side.sizes.most_common(1)[0]
    return f"{width} × {height}" if count >= SHARED_SIZE * side.sizes.total() else "mixed sizes"
