"""Vectors distributed as CLIP's are said to be, from which any number can be drawn; a check that prints what they measure.

An image is unit(cone + topic + subtopic + patch + noise). Energies, squared lengths on average, in that order:

    cone      1.00   one direction for all images, so that two random ones have cosine 1 / 2
    topic     0.35   one of 200, by Zipf's law (weight 1 / (10 + rank)): dense and sparse regions
    subtopic  0.25   one of 50 within the topic (weight 1 / (5 + rank))
    patch     0.35   a curved sheet of 24 dimensions for each topic: linear terms hold 3/4 of it, squares the rest
    noise     0.05   in all directions

Every random direction has the same power-law spectrum, as principal components of real embeddings do. In each block of
16,384 rows 5 % of the rows are near-copies (cosine .93 to .995) of others, as photographs on the web are.

A text is unit(its modality's own offset + meaning + words): the offset has energy 1.3 and cosine .316 with the images'
cone (the modality gap), what remains has .7 and lies at cosine .37 to topic + subtopic of the image it describes; the
words' directions have another spectrum. So texts are queries from outside the distribution that was indexed.

It is not CLIP. How far text recall falls is the figure that depends most on the recipe: quote recall on real embeddings.

    python benchmarks/vector_search/clip_like.py      draws 20,000 and prints the check
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Int

BLOCK_ROWS = 16_384
COPIES = 0.05
COPY_COSINES = (0.93, 0.995)
TOPIC, SUBTOPIC, PATCH, NOISE = 0.35, 0.25, 0.35, 0.05
CURVED = 0.25
OFFSET, OFFSET_COSINE, MATCH_COSINE = 1.3, 0.316, 0.37
SHARED_WORDS = 0.6
EXPECTED = {
    "image with random image": 0.50,
    "text with random text": 0.65,
    "text with random image": 0.18,
    "text with its image": 0.30,
}
"""Mean cosines the recipe is made for; what was published for CLIP ViT-B/32 lies near them."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """Which topic each row has, and topic + subtopic as a vector."""

    topics: Int[np.ndarray, "rows"]
    vectors: Float32[np.ndarray, "rows dim"]


class ClipLike:
    """The distribution: fixed by its seed, then drawn from in any amount."""

    def __init__(
        self, dim: int = 512, *, seed: int = 0, num_topics: int = 200, num_subtopics: int = 50, patch_rank: int = 24
    ) -> None:
        self.dim, self.seed, self._rank = dim, seed, patch_rank
        draw = np.random.default_rng(seed)
        spectrum = (1 + np.arange(dim) / 24) ** -0.9
        spectrum /= np.linalg.norm(spectrum)
        self._directions = _orthogonal(draw, dim) * spectrum[:, None].astype(np.float32)
        self._words = _orthogonal(draw, dim) * draw.permutation(spectrum)[:, None].astype(np.float32)
        self._cone = _unit(draw.standard_normal(dim))
        across = draw.standard_normal(dim)
        across = _unit(across - (across @ self._cone) * self._cone)
        gap = OFFSET_COSINE * self._cone + np.sqrt(1 - OFFSET_COSINE**2) * across
        self._offset = (np.sqrt(OFFSET) * gap).astype(np.float32)
        self._topics = np.sqrt(TOPIC) * self._draw(draw, num_topics)
        self._subtopics = np.sqrt(SUBTOPIC) * self._draw(draw, num_topics * num_subtopics)
        rows = num_topics * patch_rank
        linear, squares = self._draw(draw, rows), self._draw(draw, rows)
        self._linear = (linear * np.sqrt(PATCH * (1 - CURVED) / patch_rank)).reshape(num_topics, patch_rank, dim)
        self._squares = (squares * np.sqrt(PATCH * CURVED / (2 * patch_rank))).reshape(num_topics, patch_rank, dim)
        self._topic_shares, self._subtopic_shares = _zipf(num_topics, 10), _zipf(num_subtopics, 5)

    def images(self, count: int, seed: int, *, copies: bool = True) -> Float32[np.ndarray, "rows dim"]:
        """The first `count` images of one endless row of them, unit vectors."""
        out = np.empty((count, self.dim), np.float32)
        for number, start in enumerate(range(0, count, BLOCK_ROWS)):
            block = self.block(number, seed, copies=copies)
            out[start : start + BLOCK_ROWS] = block[: count - start]
        return out

    def block(self, number: int, seed: int, *, copies: bool = True) -> Float32[np.ndarray, "rows dim"]:
        """Rows number · BLOCK_ROWS and on of that endless row: the same whatever else is drawn."""
        draw = np.random.default_rng((self.seed, seed, number))
        images = self._images_of(self._meaning(draw, BLOCK_ROWS), draw)
        return self._with_copies(images, draw) if copies else images

    def pairs(self, count: int, seed: int) -> tuple[Float32[np.ndarray, "rows dim"], Float32[np.ndarray, "rows dim"]]:
        """Texts, and for each one an image that it describes."""
        draw = np.random.default_rng((self.seed, seed))
        meaning = self._meaning(draw, count)
        images = self._images_of(meaning, draw)
        words = SHARED_WORDS * self._draw(draw, count)
        words += np.sqrt(1 - SHARED_WORDS**2) * self._draw(draw, count, self._words)
        said = MATCH_COSINE * _unit(meaning.vectors) + np.sqrt(1 - MATCH_COSINE**2) * _unit(words)
        return _unit(self._offset + np.sqrt(2 - OFFSET) * said), images

    def _draw(
        self, draw: np.random.Generator, count: int, directions: Float32[np.ndarray, "dim dim"] | None = None
    ) -> Float32[np.ndarray, "rows dim"]:
        """Normal vectors of energy 1 with the power-law spectrum."""
        directions = self._directions if directions is None else directions
        return draw.standard_normal((count, self.dim), np.float32) @ directions

    def _meaning(self, draw: np.random.Generator, count: int) -> Meaning:
        topics = draw.choice(len(self._topic_shares), count, p=self._topic_shares)
        within = draw.choice(len(self._subtopic_shares), count, p=self._subtopic_shares)
        subtopics = topics * len(self._subtopic_shares) + within
        return Meaning(topics, self._topics[topics] + self._subtopics[subtopics])

    def _images_of(self, meaning: Meaning, draw: np.random.Generator) -> Float32[np.ndarray, "rows dim"]:
        out = self._cone + meaning.vectors
        places = draw.standard_normal((len(out), self._rank), np.float32)
        for topic in np.unique(meaning.topics):
            own = np.flatnonzero(meaning.topics == topic)
            out[own] += places[own] @ self._linear[topic] + (places[own] ** 2 - 1) @ self._squares[topic]
        return _unit(out + np.float32(np.sqrt(NOISE)) * self._draw(draw, len(out)))

    def _with_copies(
        self, images: Float32[np.ndarray, "rows dim"], draw: np.random.Generator
    ) -> Float32[np.ndarray, "rows dim"]:
        """Some rows replaced by near-copies of others; the copied ones are no copies themselves."""
        chosen = draw.permutation(len(images))[: 2 * int(COPIES * len(images))].reshape(2, -1)
        copied, replaced = images[chosen[0]], chosen[1]
        cosine = draw.uniform(*COPY_COSINES, (len(replaced), 1)).astype(np.float32)
        away = self._draw(draw, len(replaced))
        away = _unit(away - (away * copied).sum(1, keepdims=True) * copied)
        images[replaced] = cosine * copied + np.sqrt(1 - cosine**2) * away
        return images


def measured_cosines(
    images: Float[np.ndarray, "images dim"],
    texts: Float[np.ndarray, "texts dim"] | None,
    described: Float[np.ndarray, "texts dim"] | None = None,
) -> dict[str, float]:
    """Mean cosines of random pairs, and of matched ones where it is known which image each text describes."""
    found = {"image with random image": _off_diagonal(images)}
    if texts is not None:
        found["text with random text"] = _off_diagonal(texts)
        found["text with random image"] = float((texts @ images.T).mean())
    if texts is not None and described is not None:
        found["text with its image"] = float((texts * described).sum(1).mean())
    return found


def dimensions_for_variance(images: Float[np.ndarray, "images dim"]) -> dict[str, int]:
    """How many principal components hold 50, 80, 90 and 95 % of the variance."""
    values = np.linalg.eigvalsh(np.cov(images.T))[::-1].cumsum()
    return {f"{share} %": int((values < share / 100 * values[-1]).sum() + 1) for share in (50, 80, 90, 95)}


def _orthogonal(draw: np.random.Generator, dim: int) -> Float32[np.ndarray, "dim dim"]:
    return np.linalg.qr(draw.standard_normal((dim, dim)))[0].astype(np.float32)


def _unit(vectors: Float[np.ndarray, "*rows dim"]) -> Float32[np.ndarray, "*rows dim"]:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def _zipf(count: int, shift: int) -> Float[np.ndarray, "count"]:
    weights = 1 / (shift + np.arange(count))
    return weights / weights.sum()


def _off_diagonal(vectors: Float[np.ndarray, "rows dim"]) -> float:
    products = vectors @ vectors.T
    return float((products.sum() - np.trace(products)) / (len(vectors) * (len(vectors) - 1)))


def main() -> None:
    world = ClipLike()
    images = world.images(20_000, seed=1)
    texts, described = world.pairs(1_000, seed=3)
    for name, cosine in measured_cosines(images[:2_000], texts, described).items():
        print(f"{name:24} {cosine:.3f}   made for {EXPECTED[name]:.2f}")
    print("principal components for", dimensions_for_variance(images))


if __name__ == "__main__":
    main()
