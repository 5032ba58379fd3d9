"""What the joint encoder is judged by: names, everyday words that no caption uses, and looks that survive.

The probe measures how much of a picture's thumbnail a linear map can read back from its vector, also for concepts that
were new to the map: a vector pulled only towards its name would forget them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

from knn_diffusion import images, stickers
from knn_diffusion.models.encoders import SmallJointEncoder
from knn_diffusion.stickers.dataset import NamedGlyphs

PROBE_SIDE = 8
PROBE_RIDGE = 1e-3
NEAREST = 5
PREVIEW_WORDS = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderBenchmark:
    """Pictures and words the encoder never trains on.

    gallery: one picture of each concept; names: what it shows; probe: random scenes for the probe, the first half of
    them of other concepts than the second half.
    """

    gallery: UInt8[np.ndarray, "items height width 3"]
    names: Sequence[str]
    queries: Sequence[str]
    everyday: Mapping[str, Sequence[str]]
    probe: UInt8[np.ndarray, "images height width 3"]

    def judge(self, encoder: SmallJointEncoder) -> dict[str, float]:
        """Top-1 and top-5 by name, top-5 by everyday word, and the probe's R²."""
        own = self.nearest(encoder, self.queries) == np.arange(len(self.names))[:, None]
        metrics = {"name_top1": float(own[:, 0].mean()), "name_top5": float(own.any(1).mean())}
        found = zip(self.everyday.values(), self.nearest(encoder, list(self.everyday)), strict=True)
        right = [any(self.names[i] in means for i in row) for means, row in found]
        if right:
            metrics["everyday_top5"] = float(np.mean(right))
        return metrics | looks_probe(encoder.encode_arrays(self.probe), self.probe)

    def nearest(self, encoder: SmallJointEncoder, texts: Sequence[str]) -> Int[np.ndarray, "queries k"]:
        """Rows of the five gallery pictures nearest to each text, best first."""
        likeness = encoder.encode_texts(texts) @ encoder.encode_arrays(self.gallery).T
        return np.argsort(-likeness, axis=1, kind="stable")[:, :NEAREST]

    def preview(self, encoder: SmallJointEncoder) -> Image.Image | None:
        """Some of the everyday words, each with its five nearest pictures."""
        words = list(self.everyday)[:: max(1, len(self.everyday) // PREVIEW_WORDS)]
        if not words:
            return None
        rows = self.nearest(encoder, words)
        pictures = [Image.fromarray(self.gallery[i]) for row in rows for i in row]
        labels = [word if rank == 0 else "" for word in words for rank in range(rows.shape[1])]
        return images.grid(pictures, rows.shape[1], 96, labels)


def sticker_benchmark(
    size: int, glyphs: NamedGlyphs | None = None, probe_count: int = 3000, seed: int = 77
) -> EncoderBenchmark:
    """Fresh renders of every concept that is no flat sign, on every background colour in turn."""
    every = [concept for concept in stickers.concepts(glyphs) if not concept.flat]
    scenes = [
        stickers.one_object_scene(concept, stickers.COLOURS[i % len(stickers.COLOURS)], seed + i)
        for i, concept in enumerate(every)
    ]
    halves = every[::2], every[1::2]
    probe = [stickers.sample_scene(seed * 10_007 + i, halves[i * 2 // probe_count], "all") for i in range(probe_count)]
    names = {concept.name for concept in every}
    return EncoderBenchmark(
        gallery=stickers.render_array(scenes, size, glyphs),
        names=[concept.name for concept in every],
        queries=[concept.phrase for concept in every],
        everyday={word: means for word, means in stickers.everyday_words().items() if not names.isdisjoint(means)},
        probe=stickers.render_array(probe, size, glyphs),
    )


def looks_probe(
    vectors: Float[np.ndarray, "items dim"], pixels: UInt8[np.ndarray, "items height width 3"]
) -> dict[str, float]:
    """How much of an 8×8 thumbnail's variance a ridge regression reads from the vectors, R² in (-∞, 1].

    Returns: `looks_r2`, fitted and judged on alternating pictures; `looks_r2_new`, fitted on the first half and judged on
    the second, which shows other concepts.
    """
    step = pixels.shape[1] // PROBE_SIDE
    small = pixels.reshape(len(pixels), PROBE_SIDE, step, PROBE_SIDE, step, 3).mean((2, 4), dtype=np.float32)
    target = small.reshape(len(pixels), -1) / 255
    middle = len(pixels) // 2
    return {
        "looks_r2": _ridge_r2(vectors[::2], target[::2], vectors[1::2], target[1::2]),
        "looks_r2_new": _ridge_r2(vectors[:middle], target[:middle], vectors[middle:], target[middle:]),
    }


def _ridge_r2(x: np.ndarray, y: np.ndarray, x_new: np.ndarray, y_new: np.ndarray) -> float:
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y, x_new = (x - x_mean).astype(np.float64), (y - y_mean).astype(np.float64), x_new - x_mean
    gram = x.T @ x
    weights = np.linalg.solve(gram + PROBE_RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)), x.T @ y)
    residual = np.square(x_new @ weights - (y_new - y_mean)).sum()
    return float(1 - residual / np.square(y_new - y_new.mean(0)).sum())
