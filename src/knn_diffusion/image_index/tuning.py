"""Tune an image index to its own images and to given texts, and report what it finds, at what cost, and after growth."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from knn_diffusion.checkpoint import atomic_path
from knn_diffusion.errors import UsageError
from knn_diffusion.image_index.index import ImageIndex
from knn_diffusion.image_index.queries import as_texts
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval import tuning
from knn_diffusion.retrieval.drift import Drift, drift
from knn_diffusion.retrieval.plan import Modality, Reach
from knn_diffusion.retrieval.tuning import Gap, Measured, Queries

SAMPLE = 500
PLOTS = (".png", ".svg", ".pdf")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tuned:
    """What one modality was tuned to, and everything that was measured on the way."""

    modality: Modality
    chosen: Measured
    tried: tuple[Measured, ...]
    met: bool
    """Whether the recall asked for was reached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Growth:
    """What images cost that came after cells and codes were trained.

    recall      of images as queries at the reach in use, of those that were there, if any are left, and of later ones
    imbalance   times as many images that a query meets in its cells as if all cells were equally full
    """

    drift: Drift
    earlier_recall: float | None
    later_recall: float
    imbalance: float
    worth_training: bool

    def __str__(self) -> str:
        """In two lines."""
        advice = " Train again: index tune INDEX --retrain." if self.worth_training else " They still fit."
        before = "" if self.earlier_recall is None else f"{self.earlier_recall:.3f} for images of before, "
        return f"Growth: {self.drift}.\nRecall {before}{self.later_recall:.3f} for later ones; cells {self.imbalance:.1f} times as full as if all were equally full.{advice}"


@dataclass(frozen=True, kw_only=True, slots=True)
class IndexReport:
    """Recall against time for each modality, and the gap between them.

    How many neighbors a drawing needs is a matter of the denoiser and not told by distances: `evaluate -k` measures it.
    """

    plan: str
    exact: bool
    count: int
    k: int
    curves: dict[Modality, list[Measured]]
    in_use: dict[Modality, Reach]
    gap: Gap | None
    growth: Growth | None
    """None where every image is compared, and where none came after the training."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def to_markdown(self) -> str:
        """A table for each modality, and what else there is to say."""
        lines = [f"{self.count:,} images, {self.plan}", ""]
        for modality, points in self.curves.items():
            lines += [
                f"| {modality} queries: cells looked into | recall@{self.k} | ms a query |",
                "| --- | --- | --- |",
                *(f"| {one.reach.probes} | {one.recall:.3f} | {one.milliseconds:.2f} |" for one in points),
                "",
                self._used(modality),
                "",
            ]
        if self.gap is not None:
            gap = self.gap
            lines.append(
                f"Gap: mean cosine {gap.image_image:.3f} between images, {gap.text_text:.3f} between texts, "
                f"{gap.text_image:.3f} between a text and an image; with the nearest image {gap.image_nearest:.3f} from "
                f"an image, {gap.text_nearest:.3f} from a text."
            )
        if self.growth is not None:
            lines += ["", str(self.growth)]
        return "\n".join(lines).rstrip() + "\n"

    def _used(self, modality: Modality) -> str:
        if self.exact:
            return "Every image is compared."
        reach = self.in_use[modality]
        return f"In use for {modality} queries: {reach.probes} cells, depth {reach.depth}."

    def plot(self, path: Path) -> None:
        """Draw recall against time into a PNG, SVG or PDF file. Raises: UsageError for another, or without matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise UsageError(
                "expected matplotlib to draw the plot, it is not installed: pip install 'knn-diffusion[report]'"
            ) from None
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for modality, points in self.curves.items():
            axes.plot([one.milliseconds for one in points], [one.recall for one in points], "o-", label=modality)
            for one in points:
                axes.annotate(str(one.reach.probes), (one.milliseconds, one.recall), fontsize=7)
        axes.set(xlabel="milliseconds a query", ylabel=f"recall@{self.k}", title=f"{self.count:,} images, {self.plan}")
        axes.set_xlim(left=0)
        axes.legend(title="queries; numbers: cells")
        require_plot(path)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=150)


def tune(
    index: ImageIndex,
    texts: Sequence[str] = (),
    *,
    target: float = 0.95,
    k: int = 10,
    sample: int = SAMPLE,
    save: bool = True,
    retrain: bool = False,
    progress: Progress | None = None,
) -> list[Tuned]:
    """Find the least reach with a recall of at least `target`, for images and, if any are given, for texts.

    Args:
        retrain: first train cells and codes on the images there are now (ImageIndex.retrain).
        texts: what users will ask for, a few hundred; not captions of images in the index.
        sample: images of the index to measure on.
        save: keep the reaches with the index, for all later searches.

    Raises: UsageError when the index compares every image anyway, or is too small for k, and for a recall that cannot be;
        StoreError when it is read-only and should keep the reaches, or is compacted meanwhile.
    """
    if index.plan().layout == "exact":
        raise UsageError(
            f"expected an index that searches in cells, one of {len(index):,} images compares them all and misses none: "
            "there is nothing to tune"
        )
    if not 0 < target <= 1:
        raise UsageError(f"expected a recall above 0 and at most 1, got {target:g}: 0.95 finds 19 of 20 neighbors")
    if retrain:
        index.retrain(progress=progress)
    found = []
    for queries in _queries(index, texts, k, sample):
        chosen, tried = tuning.calibrate(index.retriever, queries, target, progress)
        met = chosen.recall >= target
        found.append(Tuned(modality=queries.modality, chosen=chosen, tried=tuple(tried), met=met))
    if save:
        settings = index.retriever.settings
        reaches = {one.modality: one.chosen.reach for one in found}
        index.set_reach(
            replace(settings, image=reaches.get("image", settings.image), text=reaches.get("text", settings.text))
        )
    return found


def report(
    index: ImageIndex,
    texts: Sequence[str] = (),
    *,
    k: int = 10,
    sample: int = SAMPLE,
    progress: Progress | None = None,
) -> IndexReport:
    """Measure recall against time over the reaches; changes nothing. Arguments and errors as `tune`."""
    asked = _queries(index, texts, k, sample)
    settings = index.retriever.settings
    gap = tuning.modality_gap(asked[0], asked[1]) if len(asked) > 1 else None
    return IndexReport(
        plan=index.plan().engine,
        exact=index.plan().layout == "exact",
        count=len(index),
        k=k,
        curves={one.modality: tuning.curve(index.retriever, one, progress) for one in asked},
        in_use={one.modality: settings.reach(one.modality) for one in asked},
        gap=gap,
        growth=_growth(index, k, sample),
    )


def require_plot(path: Path) -> None:
    """Raise UsageError for a file name that says none of PLOTS; worth asking before the work."""
    if path.suffix.lower() not in PLOTS:
        raise UsageError(f"expected a {', '.join(PLOTS)} file for the plot, got {path}: change its name")


def read_texts(path: Path) -> list[str]:
    """Texts of a file, one a line. Raises: UsageError when it cannot be read or holds none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise UsageError(f"expected a text file, one query a line, {path} cannot be read ({error}): mend it") from None
    if not (found := [line.strip() for line in lines if line.strip()]):
        raise UsageError(f"expected a text file, one query a line, {path} is empty: write queries into it")
    return found


def usable_texts(index: ImageIndex, texts: Sequence[str], notice: Callable[[str], None]) -> list[str]:
    """The texts that the index's encoder can read; the others are said by a line each.

    Raises: UsageError when there are texts and none can be read.
    """
    usable = list[str]()
    for text in texts:
        try:
            index.encoder.encode_texts(as_texts(text))
        except UsageError as error:
            notice(f"left out {text!r}: {error}")
        else:
            usable.append(text)
    if texts and not usable:
        raise UsageError(f"expected texts that {index.encoder.name} can read, none of {len(texts)} is: write others")
    return usable


def _growth(index: ImageIndex, k: int, sample: int) -> Growth | None:
    retriever = index.retriever
    found, trained = drift(retriever), retriever.trained()
    if found is None or trained is None:
        return None

    def recall(start: int, end: int) -> float:
        queries = tuning.image_queries(retriever.store, sample, k, records=range(start, end))
        return tuning.measure(retriever, queries, retriever.settings.image).recall

    return Growth(
        drift=found,
        earlier_recall=None if found.earlier_distance is None else recall(0, trained[1]),
        later_recall=recall(trained[1], retriever.store.snapshot().num_records),
        imbalance=retriever.imbalance(),
        worth_training=found.worth_training,
    )


def _queries(index: ImageIndex, texts: Sequence[str], k: int, sample: int) -> list[Queries]:
    for name, value in (("k", k), ("sample", sample)):
        if value < 1:
            raise UsageError(f"expected {name} of at least 1, got {value}: measure on more")
    store = index.retriever.store
    found = [tuning.image_queries(store, sample, k)]
    if texts:
        found.append(tuning.text_queries(store, index.encoder.encode_texts(list(texts)), k))
    return found
