"""The sticker world: pictures drawn from a colour emoji font, with known content and no download.

`sample_scene` decides what is shown, `draw` shows it, `caption` tells it. The generator learns from the pixels only;
captions are for the joint encoder and for evaluation. The split into training and held-out concepts is a fixed file.
"""

from knn_diffusion.stickers.concepts import (
    Concept,
    Split,
    concept_named,
    concepts,
    everyday_words,
    held_out_pairs,
    of_split,
    split_digest,
    with_article,
)  # fmt: skip
from knn_diffusion.stickers.dataset import make_dataset, render_array
from knn_diffusion.stickers.drawing import draw
from knn_diffusion.stickers.glyphs import FolderGlyphs, FontGlyphs, GlyphSource, find_font
from knn_diffusion.stickers.scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    TINTS,
    Scene,
    Thing,
    caption,
    captions,
    evaluation_prompts,
    one_object_scene,
    sample_scene,
    sample_scenes,
)  # fmt: skip

__all__ = [
    "BACKGROUNDS", "COLOURS", "RELATIONS", "TINTS", "Concept", "FolderGlyphs", "FontGlyphs", "GlyphSource", "Scene", "Split", "Thing",
    "caption", "captions", "concept_named", "concepts", "draw", "evaluation_prompts", "everyday_words", "find_font", "held_out_pairs",
    "make_dataset", "of_split", "one_object_scene", "render_array", "sample_scene", "sample_scenes", "split_digest", "with_article",
]  # fmt: skip
