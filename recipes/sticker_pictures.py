"""Pictures of one concept each, named by what they show: those the bundled index retrieves from, and the demo's new concept.

python recipes/sticker_pictures.py FOLDER                          every training concept on several backgrounds
python recipes/sticker_pictures.py FOLDER --concept pineapple      one concept, also a held-out one, on every colour
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from knn_diffusion import stickers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--concept", help="only this one; default: all that are not held out")
    parser.add_argument("--colours", type=int, default=7, help="background colours of each concept, 1 … 11")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=3)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    glyphs = stickers.FontGlyphs()
    if options.concept:
        chosen, colours = [stickers.concept_named(options.concept)], len(stickers.COLOURS)
    else:
        chosen, colours = list(stickers.of_split(stickers.concepts(), "train")), options.colours
    for number, concept in enumerate(chosen):
        rng = random.Random(f"index {options.seed} {concept.name}")
        for turn in range(colours):
            colour = stickers.COLOURS[(number + turn * len(stickers.COLOURS) // colours) % len(stickers.COLOURS)]
            # Never mirrored: neighbors that look two ways are blended into what looks neither way.
            scene = stickers.one_object_scene(
                concept,
                colour,
                rng.getrandbits(32),
                background=rng.choice(stickers.BACKGROUNDS),
                outlined=rng.random() < 0.5,
            )
            name = f"{concept.name} on {colour}.png".replace("/", "-")
            stickers.draw(scene, options.size, glyphs).save(options.folder / name)


if __name__ == "__main__":
    main()
