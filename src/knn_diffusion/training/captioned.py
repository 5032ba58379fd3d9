"""Images with several captions each: what the joint encoder trains on, as CLIP did on pairs found with their texts.

Sentence vectors of a frozen text tower do not change, so each different caption is read once and its vector kept.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from knn_diffusion import images, stickers
from knn_diffusion.config import parse_json
from knn_diffusion.device import choose_dtype
from knn_diffusion.errors import UsageError
from knn_diffusion.models.text_tower import SentenceEncoder
from knn_diffusion.progress import Progress
from knn_diffusion.stickers.dataset import NamedGlyphs
from knn_diffusion.training.data import Batch, cached_array

MAX_SHIFT = 4
NO_FACT = -1
SENTENCES_AT_ONCE = 64
Fact = tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionedImages:
    """Pixels, the sentence vectors of their captions, and which facts picture and caption hold.

    The first caption of each is its plainest: what is shown, and as little else as possible. A caption is also true of
    another picture when all of its facts hold there; facts are numbers, padded with -1.
    """

    pixels: UInt8[np.ndarray, "items height width 3"]
    sentences: Float[np.ndarray, "texts text_width"]
    caption_rows: Int[np.ndarray, "items captions"]
    facts: Int[np.ndarray, "items facts"]
    caption_facts: Int[np.ndarray, "items captions told"]
    may_mirror: Bool[np.ndarray, "items"]

    def __len__(self) -> int:
        return len(self.pixels)

    def digest(self) -> str:
        """A name of the pictures and of which captions they share."""
        found = hashlib.sha256(np.ascontiguousarray(self.pixels).data)
        found.update(np.ascontiguousarray(self.caption_rows).data)
        return found.hexdigest()

    def batch(self, indices: Int[Tensor, "batch"], generator: torch.Generator) -> Batch:
        """`pixels`, the `sentences` of one caption of each, and `also_true` as `contrastive_loss` wants it.

        Pictures are shifted by up to four pixels, and mirrored half of the time where no caption says left or right.
        """
        rows = indices.numpy()
        chosen = torch.randint(self.caption_rows.shape[1], (len(rows),), generator=generator).numpy()
        mirrored = (torch.rand(len(rows), generator=generator) < 0.5).numpy() & self.may_mirror[rows]
        shifts = torch.randint(2 * MAX_SHIFT + 1, (len(rows), 2), generator=generator).numpy()
        sentences = self.sentences[self.caption_rows[rows, chosen]].astype(np.float32)
        return {
            "pixels": images.pixels_from_uint8(_moved(self.pixels[rows], shifts, mirrored)),
            "sentences": torch.from_numpy(sentences),
            "also_true": torch.from_numpy(holds(self.facts[rows], self.caption_facts[rows, chosen])),
        }


def holds(facts: Int[np.ndarray, "a facts"], told: Int[np.ndarray, "b told"]) -> Bool[np.ndarray, "a b"]:
    """[i, j]: whether everything told in j is a fact of i."""
    known = (facts[:, None, None, :] == told[None, :, :, None]).any(-1)
    return (known | (told == NO_FACT)[None]).all(-1)


def sticker_pairs(
    sentence_encoder: SentenceEncoder,
    cache: Path,
    *,
    count: int,
    seed: int = 0,
    size: int = 64,
    captions_each: int = 4,
    glyphs: NamedGlyphs | None = None,
    report: Progress | None = None,
) -> CaptionedImages:
    """Rendered scenes of every concept, the generator's held-out ones included, with captions; computed once.

    The encoder plays the part of CLIP, which also knows more than the generator ever drew.

    Args:
        cache: folder for the pixels and sentence vectors.
        report: called with what is being done, how many are done, how many there are.
    Raises: MissingDependencyError when the emoji font is missing.
    """
    source = stickers.FontGlyphs() if glyphs is None else glyphs
    scenes = stickers.sample_scenes(count, seed, "all", source)
    facts = {"split": stickers.split_digest(), "glyphs": source.digest, "count": count, "seed": seed, "size": size}
    pixels = cached_array(cache, "scenes", facts, lambda: stickers.render_array(scenes, size, source, progress=report))
    rng = random.Random(f"captions {seed}")
    texts = [[plainest(scene), *stickers.captions(scene, rng, captions_each - 1)] for scene in scenes]
    different = list(dict.fromkeys(text for each in texts for text in each))
    sentences = sentence_vectors(different, sentence_encoder, cache, report)
    row_of = {text: row for row, text in enumerate(different)}
    numbers: dict[Fact, int] = {}
    told = [
        [_numbered(told_facts(scene, text), numbers) for text in each]
        for scene, each in zip(scenes, texts, strict=True)
    ]
    return CaptionedImages(
        pixels=pixels,
        sentences=sentences,
        caption_rows=np.array([[row_of[text] for text in each] for each in texts], np.int32),
        facts=_table([_numbered([fact for fact, _ in scene_facts(scene)], numbers) for scene in scenes]),
        caption_facts=_table([row for each in told for row in each]).reshape(count, captions_each, -1),
        may_mirror=np.array([scene.relation not in ("left of", "right of") for scene in scenes]),
    )


def folder_pairs(
    sources: Sequence[str | Path], sentence_encoder: SentenceEncoder, cache: Path, *, size: int, report: Progress | None
) -> CaptionedImages:
    """Pictures of folders with a `captions.jsonl`: one object a line, `file` and either `caption` or `captions`.

    A caption is also true of another picture that has the same one. Pictures are never mirrored: captions may tell sides.

    Raises: UsageError when a folder has no captions or a line is not such an object; ImageError when a picture is unreadable.
    """
    found = [pair for source in sources for pair in _read_captions(Path(source))]
    if not found:
        raise UsageError("expected pictures with captions, captions.jsonl has none: add lines with file and caption")
    digest = hashlib.sha256("".join(f"{file} {file.stat().st_size};" for file, _ in found).encode()).hexdigest()

    def decode() -> np.ndarray:
        pixels = np.empty((len(found), size, size, 3), np.uint8)
        for i, (file, _) in enumerate(found):
            pixels[i] = images.to_array(images.square(images.open_image(file), size))
            if report is not None:
                report("decoding images", i + 1, len(found))
        return pixels

    different = list(dict.fromkeys(text for _, texts in found for text in texts))
    sentences = sentence_vectors(different, sentence_encoder, cache, report)
    row_of = {text: row for row, text in enumerate(different)}
    most = max(len(texts) for _, texts in found)
    rows = np.array([[row_of[texts[i % len(texts)]] for i in range(most)] for _, texts in found], np.int32)
    return CaptionedImages(
        pixels=cached_array(cache, "pictures", {"files": digest, "size": size}, decode),
        sentences=sentences,
        caption_rows=rows,
        facts=rows,
        caption_facts=rows[..., None],
        may_mirror=np.zeros(len(found), bool),
    )


def _read_captions(folder: Path) -> list[tuple[Path, list[str]]]:
    path = folder / "captions.jsonl"
    if not path.is_file():
        raise UsageError(f"expected a folder with captions.jsonl, {folder} has none: the encoder learns from captions")
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            entry = parse_json(line)
            texts = entry["captions"] if "captions" in entry else [entry["caption"]]
            pairs.append((folder / entry["file"], sorted(map(str, texts), key=len)))
        except (ValueError, KeyError, TypeError):
            raise UsageError(
                f'expected {{"file": ..., "caption": ...}} in line {number} of {path}, got {line[:60]!r}: mend it'
            ) from None
    return pairs


def sentence_vectors(
    texts: Sequence[str], encoder: SentenceEncoder, cache: Path, report: Progress | None = None
) -> Float[np.ndarray, "texts text_width"]:
    """Sentence vectors in float16, in the order of `texts`, computed once with the fastest arithmetic at hand."""

    def compute() -> np.ndarray:
        device = encoder.tower.words.weight.device
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        made = np.empty((len(texts), encoder.dim), np.float16)
        dtype = choose_dtype(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            for start in range(0, len(order), SENTENCES_AT_ONCE):
                rows = order[start : start + SENTENCES_AT_ONCE]
                made[rows] = encoder.encode([texts[i] for i in rows], SENTENCES_AT_ONCE).half().cpu().numpy()
                if report is not None:
                    report("reading captions", start + len(rows), len(texts))
        return made

    weight = encoder.tower.words.weight
    facts = {"texts": "\n".join(texts), "tower": (float(weight.sum()), tuple(weight.shape))}
    return cached_array(cache, "sentences", facts, compute)


def plainest(scene: stickers.Scene) -> str:
    """The names of what a scene shows, and nothing else."""
    return " and ".join(thing.name for thing in scene.things)


def scene_facts(scene: stickers.Scene) -> list[tuple[Fact, tuple[str, ...]]]:
    """Each fact of a scene with the wordings that tell it; a fact without wordings is told by every caption."""
    colour, pattern = scene.background_colour, scene.background
    ground = (f"{colour} background", f"on {colour}", f"{colour} {pattern} background")
    facts: list[tuple[Fact, tuple[str, ...]]] = [(("ground", colour), ground), (("pattern", pattern), (f"{pattern} ",))]
    for thing in scene.things:
        facts.append((("thing", thing.name), ()))
        if thing.tint:
            facts.append((("tint", thing.tint, thing.name), (f"{thing.tint} {thing.name}",)))
        if thing.turned == 180:
            facts.append(
                (("turned", thing.name), (f"upside-down {thing.name}", f"upside-down {thing.tint} {thing.name}"))
            )
    if scene.relation:
        facts.append((("relation", scene.relation), (f" {scene.relation} ",)))
    return facts


def told_facts(scene: stickers.Scene, caption: str) -> list[Fact]:
    """Those facts of the scene that the caption tells."""
    return [fact for fact, wordings in scene_facts(scene) if not wordings or any(word in caption for word in wordings)]


def _numbered(facts: Sequence[Fact], numbers: dict[Fact, int]) -> list[int]:
    return [numbers.setdefault(fact, len(numbers)) for fact in facts]


def _table(rows: Sequence[Sequence[int]]) -> Int[np.ndarray, "rows facts"]:
    longest = max(len(row) for row in rows)
    return np.array([[*row, *[NO_FACT] * (longest - len(row))] for row in rows], np.int32)


def _moved(
    pixels: UInt8[np.ndarray, "batch height width 3"],
    shifts: Int[np.ndarray, "batch 2"],
    mirrored: Bool[np.ndarray, "batch"],
) -> UInt8[np.ndarray, "batch height width 3"]:
    """Each picture shifted, its edge pixels repeated, and some mirrored."""
    size = pixels.shape[1]
    padded = np.pad(pixels, ((0, 0), (MAX_SHIFT, MAX_SHIFT), (MAX_SHIFT, MAX_SHIFT), (0, 0)), mode="edge")
    moved = np.empty_like(pixels)
    for i, (down, right) in enumerate(shifts):
        view = padded[i, down : down + size, right : right + size]
        moved[i] = view[:, ::-1] if mirrored[i] else view
    return moved
