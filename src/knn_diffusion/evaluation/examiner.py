"""One model before one judge: what can be asked of it, and how an answer becomes a figure.

`Examiner` draws, retrieves, renders, reconstructs and has pictures judged; `protocols.py` says what is asked.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image

from knn_diffusion import images, stickers
from knn_diffusion.config import config, require
from knn_diffusion.errors import StoreError
from knn_diffusion.evaluation.frechet import bootstrap_frechet, bootstrap_infinity, frechet_distance, frechet_infinity
from knn_diffusion.evaluation.kernels import kid
from knn_diffusion.evaluation.metrics import Features, bootstrap_estimate
from knn_diffusion.evaluation.report import Row
from knn_diffusion.models.judge import Judge, Judgement, judge_images
from knn_diffusion.progress import Progress
from knn_diffusion.randomness import derive_seed
from knn_diffusion.stickers.dataset import NamedGlyphs

Pictures = list[Image.Image]

ADDED_SEED, REFERENCE_SEED, VALIDATION_SEED, CEILING_SEED = 910, 911, 912, 913
"""Data sets of the sticker world kept for evaluation: no part is trained on them."""

Prompt = tuple[str, stickers.Concept, str]
"""What is asked, the concept it names, and the background colour."""


@runtime_checkable
class Pipe(Protocol):
    """The part of `KnnDiffusion` that an evaluation uses."""

    index: Any
    model: Any
    tokenizer: Any

    def __call__(self, prompt: str, **settings: Any) -> Any:
        """An output with `images` and `neighbors`."""


@config
class EvaluationConfig:
    """How much is asked, and how the model draws; None leaves the model's own default."""

    num_prompts: int = 200
    """Prompts whose answers the judge grades."""
    num_distance: int = 1_000
    """Pictures on each side of a Fréchet distance; 5,000 where a GPU draws them."""
    seed: int = 0
    """Prompts and drawings follow from it."""
    k: int | None = None
    """Neighbors retrieved for each prompt."""
    num_steps: int | None = None
    """Passes through the denoiser."""
    guidance_scale: float | None = None
    """λ of Sec. 3.2."""
    pictures_added: int = 12
    """Pictures of each held-out concept that `adapts` adds to the index."""
    resamples: int = 100
    """Bootstrap draws behind each interval of a distance."""

    def __post_init__(self) -> None:
        require(self.num_prompts >= 1, "num_prompts", self.num_prompts, "at least 1")
        require(self.num_distance >= 2, "num_distance", self.num_distance, "at least 2")
        require(self.pictures_added >= 1, "pictures_added", self.pictures_added, "at least 1")
        require(self.resamples >= 10, "resamples", self.resamples, "at least 10")


@dataclass(frozen=True, kw_only=True, slots=True)
class Examiner:
    """Everything a protocol needs: the model asked, the judge, the pictures of the sticker world, and how much to ask."""

    pipe: Pipe
    judge: Judge
    config: EvaluationConfig
    glyphs: NamedGlyphs
    progress: Progress = lambda what, done, total: None

    @property
    def known(self) -> tuple[stickers.Concept, ...]:
        """The concepts the glyph source can draw."""
        return stickers.concepts(self.glyphs)

    def draw(self, prompts: Sequence[str], what: str, **changed: Any) -> tuple[Pictures, Pictures]:
        """One picture for each prompt, and the picture retrieved first for it; the n-th prompt has the n-th seed.

        Args: changed: settings of the request other than the configuration's.
        """
        asked = {
            "k": self.config.k,
            "num_inference_steps": self.config.num_steps,
            "guidance_scale": self.config.guidance_scale,
        } | changed
        settings = {name: value for name, value in asked.items() if value is not None}
        drawn: Pictures = []
        retrieved: Pictures = []
        for number, prompt in enumerate(prompts):
            out = self.pipe(prompt, num_images_per_prompt=1, seed=derive_seed(self.config.seed, number), **settings)
            drawn.append(out.images[0])
            if out.neighbors:
                retrieved.append(self.pipe.index.preview(out.neighbors[0].id))
            self.progress(what, number + 1, len(prompts))
        return drawn, retrieved

    def render(self, scenes: Sequence[stickers.Scene]) -> Pictures:
        """The scenes as the sticker world draws them, at the judge's size."""
        return [Image.fromarray(array) for array in stickers.render_array(scenes, self.judge.config.size, self.glyphs)]

    def reconstruct(self, pictures: Pictures) -> Pictures:
        """What the tokenizer makes of pictures: the best any drawing of this model can be."""
        return reconstruct(self.pipe, pictures)

    def opinion(self, pictures: Pictures) -> Judgement:
        """The judge's verdicts."""
        return judge_images(self.judge, pictures)


def distance_scenes(examiner: Examiner, data_seed: int) -> list[stickers.Scene]:
    """The scenes of one of the data sets kept for evaluation, of concepts seen in training."""
    return stickers.sample_scenes(examiner.config.num_distance, data_seed, "train", examiner.glyphs)


def reference_features(examiner: Examiner, data_seed: int) -> Features:
    """The judge's features of the scenes as rendered."""
    return examiner.opinion(examiner.render(distance_scenes(examiner, data_seed))).features


def drawn_features(examiner: Examiner, data_seed: int, **changed: Any) -> Features:
    """The judge's features of drawings of the scenes' captions, drawn with changed settings."""
    captions = [stickers.caption(scene) for scene in distance_scenes(examiner, data_seed)]
    what = ", ".join(["drawing captions", *(f"{name} {value}" for name, value in changed.items())])
    return examiner.opinion(examiner.draw(captions, what, **changed)[0]).features


def distance_row(of: str, features: Features, reference: Features, config: EvaluationConfig) -> Row:
    """The plain distance of one set from the reference, with its bootstrap interval."""
    value = frechet_distance(features, reference)
    draws = bootstrap_frechet(features, reference, num_resamples=config.resamples, seed=config.seed)
    return Row(
        measure="Fréchet distance", of=of, estimate=bootstrap_estimate(value, draws, len(features)), unit="distance"
    )


def unbiased_rows(
    of: str,
    features: Features,
    reference: Features,
    config: EvaluationConfig,
    draws: Float[np.ndarray, "resamples"] | None = None,
) -> list[Row]:
    """FD∞ and KID of one set from a reference of other scenes, with their intervals.

    Args: draws: what `bootstrap` gives, where it is at hand.
    """
    value = frechet_infinity(features, reference, seed=config.seed)
    draws = bootstrap(features, reference, config) if draws is None else draws
    estimate = bootstrap_estimate(value, draws, len(features))
    return [
        Row(measure="FD∞", of=of, estimate=estimate, unit="distance"),
        Row(measure="KID", of=of, estimate=kid(features, reference).estimate, unit="distance"),
    ]


def scenes_of(prompts: Sequence[Prompt], seed: int) -> list[stickers.Scene]:
    """What evaluation prompts ask for, as scenes to render."""
    return [
        stickers.one_object_scene(concept, colour, derive_seed(seed, "asked", number))
        for number, (_, concept, colour) in enumerate(prompts)
    ]


def shown_in(source: str, names: Collection[str]) -> set[str]:
    """The concepts an image's source names, longest names first: "hot-dog-3.png" shows a hot dog and no dog."""
    text = f" {re.sub(r'[^a-z0-9]+', ' ', source.lower())} "
    found = set()
    for name in sorted(names, key=len, reverse=True):
        words = f" {re.sub(r'[^a-z0-9]+', ' ', name.lower()).strip()} "
        if words.strip() and words in text:
            found.add(name)
            text = text.replace(words, "  ")
    return found


def has_index(pipe: Any) -> bool:
    """Whether the model has images to retrieve from; one that was trained without neighbors needs none."""
    try:
        return pipe.index is not None
    except StoreError:
        return False


def nearest_sources(pipe: Pipe, text: str, k: int) -> list[str]:
    """Where the k nearest images of a text came from, best first."""
    found = pipe.index.search(pipe.model.encoder.encode_texts([text]), k, modality="text")
    return list(pipe.index.sources([one for one in found.ids[0] if one]))


def extended(index: Any, pictures: dict[str, Image.Image]) -> Any:
    """A copy of the index in memory with pictures added under their sources; the index itself stays as it is."""
    copy = index.overlay()
    copy.add([images.SourceImage(source, source, picture.copy) for source, picture in pictures.items()])
    return copy


@torch.inference_mode()
def reconstruct(pipe: Pipe, pictures: Pictures, batch_size: int = 16) -> Pictures:
    """Pictures encoded to tokens and decoded again."""
    device = next(pipe.tokenizer.parameters()).device
    side = pipe.tokenizer.config.image_size
    rebuilt: Pictures = []
    for start in range(0, len(pictures), batch_size):
        some, alpha = pictures[start : start + batch_size], pipe.tokenizer.alpha
        squares = [images.network_input(p, side, alpha=alpha) for p in some]
        pixels = images.pixels_from_uint8(np.stack(squares)).to(device)
        decoded = images.uint8_from_pixels(pipe.tokenizer.decode(pipe.tokenizer.encode(pixels)))
        rebuilt += [Image.fromarray(array) for array in decoded]
    return rebuilt


def bootstrap(features: Features, reference: Features, config: EvaluationConfig) -> Float[np.ndarray, "resamples"]:
    """FD∞ of resampled sets; sets drawn for the same captions are resampled alike, so their draws can be compared."""
    return bootstrap_infinity(features, reference, num_resamples=config.resamples, seed=config.seed)
