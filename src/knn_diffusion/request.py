"""What can be asked of a pipeline, checked before anything is computed, and what comes back."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from PIL import Image

from knn_diffusion.diffusion.conditioning import MAX_QUERY_WEIGHT
from knn_diffusion.diffusion.plan import SamplerConfig
from knn_diffusion.diffusion.sampling import StepInfo
from knn_diffusion.errors import ConfigError, UsageError
from knn_diffusion.images import Finishing, NumberedFiles, check_finish, check_format, encode, finished, traced

MAX_PROMPT_CHARACTERS = 1000
MAX_IMAGES = 10_000
MAX_SEED = 2**63 - 1
Lead = Literal["rotate", "first"]
ORDERS = ("ancestral", "halton", "confidence")


@dataclass(frozen=True, kw_only=True, slots=True)
class Passed:
    """What a callback is told after each pass through the denoiser; it may raise to cancel."""

    done: int
    total: int
    """Passes made and to make, over all images of the prompt."""
    numbers: tuple[int, ...]
    """The images being drawn, counted from 0 within the prompt."""
    info: StepInfo


Callback = Callable[[Passed], None]
OnImage = Callable[[int, "Output"], None]
"""Takes an image's number within the prompt, from 0, and an Output of it alone; it may raise to cancel."""


class Settings(TypedDict, total=False):
    """Options of a request; what is left out is the model's own default."""

    num_images_per_prompt: int
    """Images for each prompt, 1 by default."""
    k: int
    """Neighbors to retrieve; 0 draws from the text's embedding alone. Left out, it is at most what the index holds."""
    guidance_scale: float
    """λ of Sec. 3.2: 0 ignores the prompt, 1 follows it, more exaggerates; the paper uses 8."""
    num_inference_steps: int
    """Passes through the denoiser, 1 up to the trained N."""
    sampler: str | SamplerConfig
    """An order ("ancestral", "halton", "confidence") or everything about how to draw."""
    seed: int
    """0 by default; image i of a prompt depends on the seed and on i alone."""
    exclude_ids: Sequence[str]
    """Images of the index not to retrieve."""
    query_weight: float
    """1 conditions on the text's own embedding (Eq. 5), 0 puts the neighbors' mean in its place; above 1 the text is moved
    away from that mean, so that what it says and they do not show (a colour, a place) is heard better."""
    lead: Lead
    """Which neighbor's picture an image follows most: "first" the nearest for all, "rotate" another for each image. A model that
    reads its neighbors' pictures rotates by default; for others it is "first"."""
    agreement: float
    """Neighbors whose cosine to the first one is smaller are left out; 0 leaves none out, as in the paper."""
    callback: Callback
    """Called after each pass."""
    on_image: OnImage
    """Called with each image as soon as it is drawn, so that nothing is lost when a long request is stopped."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A checked request: the settings with the model's defaults filled in."""

    num_images: int
    k: int
    sampler: SamplerConfig
    seed: int
    exclude_ids: tuple[str, ...]
    query_weight: float
    callback: Callback | None
    lead: Lead = "first"
    agreement: float = 0.0
    on_image: OnImage | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighbor:
    """One retrieved image: its id in the index, its cosine to the query, and where it came from."""

    id: str
    score: float
    source: str


class NeighborList(list[Neighbor]):
    """Neighbors, best first; also column by column."""

    @property
    def ids(self) -> list[str]:
        """Ids in the index."""
        return [neighbor.id for neighbor in self]

    @property
    def scores(self) -> list[float]:
        """Cosines to the query."""
        return [neighbor.score for neighbor in self]

    @property
    def sources(self) -> list[str]:
        """Where the images came from."""
        return [neighbor.source for neighbor in self]


@dataclass(frozen=True, kw_only=True, slots=True)
class Output:
    """The images drawn for one prompt, and everything needed to draw them again."""

    prompt: str
    images: list[Image.Image]
    neighbors: NeighborList
    """Best first; the same for every image of the prompt."""
    disagreeing: NeighborList
    """Neighbors that were left out because they disagree with the first."""
    shortfall: int
    """How many of the k neighbors the index could not give, after exclusion and de-duplication."""
    seed: int
    k: int
    steps: int
    guidance_scale: float
    sampler: str
    model: str
    seconds: float
    lead: Lead = "first"
    """Whether the first neighbor leads every image, or image i the one at place i, round and round among those that were read."""
    agreement: float = 0.0
    read: int | None = None
    """Of how many neighbors the pictures were read; 0 where the index keeps none as large as the model's. None for a model that does
    not read pictures."""

    def facts(self) -> dict[str, Any]:
        """All but the images, as plain values."""
        lists = {"neighbors": self.neighbors, "disagreeing": self.disagreeing}
        plain = ("prompt", "shortfall", "seed", "k", "steps", "guidance_scale", "sampler", "model", "seconds")
        facts: dict[str, Any] = {name: getattr(self, name) for name in (*plain, "lead", "agreement", "read")}
        for name, neighbors in lists.items():
            facts[name] = [{"id": n.id, "score": n.score, "source": n.source} for n in neighbors]
        return facts

    def settings(self, image: int) -> dict[str, Any]:
        """What is kept inside the file of an image, which may be given to anybody: `facts`, and no folder of this machine."""
        facts = self.facts()
        for name in ("neighbors", "disagreeing"):
            facts[name] = [{**neighbor, "source": source_name(neighbor["source"])} for neighbor in facts[name]]
        return {**facts, "image": image}

    def finished(self, **options: Unpack[Finishing]) -> list[Image.Image]:
        """The images as stickers of any size, with ground, border and shadow; nothing is drawn anew, `images` stay.

        Args: options: as listed in `images.Finishing`, for instance out.finished(size=512, border=True, background="teal").
        Raises: UsageError for an option that cannot be carried out.
        """
        finish = check_finish(options)
        return [finished(image, finish) for image in self.images]

    def svg(self, **options: Unpack[Finishing]) -> list[str]:
        """The images as SVG, traced, with their settings inside; options as for `finished`.

        Raises: UsageError for an option that cannot be carried out; MissingDependencyError without vtracer.
        """
        finish = check_finish(options)
        return [traced(image, finish, self.settings(i)) for i, image in enumerate(self.images)]

    def save(self, folder: str | Path, file_format: str = "png", **options: Unpack[Finishing]) -> list[Path]:
        """Write the images into a folder, under new names beside what is there, with their settings inside.

        Args:
            file_format: "png", "webp" (up to 512 pixels under 100 kB) or "svg" (traced by vtracer).
            options: as for `finished`.
        Returns: where they lie.
        Raises: UsageError for an option that cannot be carried out; KnnDiffusionError when the disk is full or not writable;
            MissingDependencyError for SVG without vtracer.
        """
        wanted, finish = check_format(file_format), check_finish(options)
        files = NumberedFiles(Path(folder), self.prompt)
        made = [
            encode(image, self.settings(i), file_format=wanted, finish=finish) for i, image in enumerate(self.images)
        ]
        return [files.add(i, one.suffix, one.content) for i, one in enumerate(made)]


def source_name(source: str) -> str:
    """The name of a source without the folders it lies in; of a picture in a shard or table, the container's name too."""
    place = source.partition("?")[0] if "://" in source else source
    container, mark, member = place.partition("::")
    return mark.join(re.split(r"[/\\]", part.rstrip("/\\"))[-1] for part in (container, member))


def check_prompt(prompt: object) -> str:
    """The prompt without surrounding space.

    Raises: UsageError when it is empty, too long, or no text.
    """
    if not isinstance(prompt, str):
        raise UsageError(f"expected a prompt as text, got {type(prompt).__name__}: describe the picture in words")
    text = prompt.strip()
    if not any(character.isprintable() and not character.isspace() for character in text):
        raise UsageError("expected a prompt, got an empty one: describe the picture in words")
    if len(text) > MAX_PROMPT_CHARACTERS:
        raise UsageError(
            f"expected a prompt of at most {MAX_PROMPT_CHARACTERS} characters, got {len(text)}: say it more shortly"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError("expected a prompt in UTF-8, got bytes that are not: check the terminal's encoding") from None
    return text


def check_request(
    settings: Settings,
    *,
    sampler: SamplerConfig,
    k: int,
    query_weight: float = 1.0,
    agreement: float = 0.0,
    reads_grids: bool = False,
) -> Request:
    """Fill in the model's defaults and check every value.

    Args: reads_grids: whether the model reads its neighbors' pictures, so that one of them can lead.

    Raises: UsageError naming the option, its rule and what came; TypeError for an option that does not exist.
    """
    unknown = sorted(settings.keys() - Settings.__annotations__.keys())
    if unknown:
        raise TypeError(f"unknown option {unknown[0]!r}; the options are {', '.join(Settings.__annotations__)}")
    given = {name: value for name, value in settings.items() if value is not None}
    weight = _number(given.get("query_weight", query_weight), "query_weight")
    if not 0 <= weight <= MAX_QUERY_WEIGHT:
        raise UsageError(f"expected query_weight from 0 to {MAX_QUERY_WEIGHT:g}, got {weight:g}: 1 is the paper's")
    excluded = given.get("exclude_ids", ())
    if isinstance(excluded, str):
        raise UsageError(f"expected exclude_ids as a list of ids, got the text {excluded!r}: put it in a list")
    least = _number(given.get("agreement", agreement), "agreement")
    if not 0 <= least <= 1:
        raise UsageError(f"expected agreement from 0 to 1, got {least:g}: 0 leaves no neighbor out")
    return Request(
        num_images=_integer(given.get("num_images_per_prompt", 1), "num_images_per_prompt", 1, MAX_IMAGES),
        k=_integer(given.get("k", k), "k", 0, 100_000),
        sampler=_sampler(given, sampler),
        seed=_integer(given.get("seed", 0), "seed", 0, MAX_SEED),
        exclude_ids=tuple(str(one) for one in excluded),  # type: ignore[attr-defined]
        query_weight=weight,
        callback=given.get("callback"),  # type: ignore[arg-type]
        lead=_lead(given, reads_grids),
        agreement=least,
        on_image=given.get("on_image"),  # type: ignore[arg-type]
    )


def _lead(given: dict[str, object], reads_grids: bool) -> Lead:
    asked = given.get("lead", "rotate" if reads_grids else "first")
    if asked == "first":
        return "first"
    if asked != "rotate":
        raise UsageError(f"expected lead as rotate or first, got {asked!r}: choose one of them")
    if not reads_grids:
        raise UsageError(
            "expected lead first, got rotate for a model that does not read its neighbors' pictures: leave it out"
        )
    return "rotate"


def _sampler(given: dict[str, object], default: SamplerConfig) -> SamplerConfig:
    asked = given.get("sampler", default)
    if not isinstance(asked, SamplerConfig) and asked not in ORDERS:
        raise UsageError(f"expected sampler as one of {', '.join(ORDERS)}, got {asked!r}: choose one of them")
    try:
        config = asked if isinstance(asked, SamplerConfig) else replace(default, order=asked)  # type: ignore[arg-type]
        if "num_inference_steps" in given:
            steps = _integer(given["num_inference_steps"], "num_inference_steps", 1, MAX_IMAGES)
            config = replace(config, num_steps=steps)
        if "guidance_scale" in given:
            config = replace(config, guidance_scale=_number(given["guidance_scale"], "guidance_scale"))
    except ConfigError as error:
        raise UsageError(str(error)) from None
    return config


def _integer(value: object, name: str, least: int, most: int) -> int:
    try:
        number = value.__index__()  # type: ignore[attr-defined]
    except AttributeError:
        raise UsageError(f"expected {name} as a whole number, got {value!r}: give one from {least} to {most}") from None
    if not least <= number <= most:
        raise UsageError(f"expected {name} from {least} to {most}, got {number}: choose another")
    return int(number)


def _number(value: object, name: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise UsageError(f"expected {name} as a number, got {value!r}: give a number") from None
    if not math.isfinite(number):
        raise UsageError(f"expected {name} as a finite number, got {number}: give a number")
    return number
