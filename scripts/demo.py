"""What `make demo` shows: prompts drawn from their neighbors, then a concept learned by adding its pictures to the index.

The first sheet has a row for each prompt: the neighbors that were retrieved, then four images. The second shows for each
folder of examples/new_concept its pictures, then four images drawn before and four drawn after they were added to the
index. No weight changes, and neither the model nor its index has seen that concept before.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from knn_diffusion import KnnDiffusion
from knn_diffusion.cli.sheet import Block, contact_sheet, drawn, retrieved
from knn_diffusion.images import find_images, save_png

PROMPTS = (
    "a red heart",
    "a puppy on a blue background",
    "an automobile",
    "a slice of pizza on a green background",
    "a rocket flying to the moon",
    "a yellow flower with a bee",
    "an octopus on a purple background",
    "a crown on an orange background",
    "a sailing boat at sea",
    "a snowman",
)
NEW_CONCEPTS = Path(__file__).parents[1] / "examples" / "new_concept"
IMAGES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stickers", help="bundled name or model folder")
    parser.add_argument("--output", type=Path, default=Path("output/demo"), help="folder for the two sheets")
    parser.add_argument("--concepts", type=Path, default=NEW_CONCEPTS, help="folder of folders named by their prompt")
    options = parser.parse_args()
    started = time.monotonic()
    pipe = KnnDiffusion.from_pretrained(options.model)
    sheets = [options.output / "contact-sheet.png", options.output / "new-concept.png"]
    save_png(contact_sheet([prompt_row(pipe, prompt) for prompt in PROMPTS]), sheets[0])
    rows = [concept_row(pipe, folder) for folder in sorted(options.concepts.iterdir()) if folder.is_dir()]
    save_png(contact_sheet(rows), sheets[1])
    print(f"\nDone in {time.monotonic() - started:.0f} s.")
    print(f"Prompts, their neighbors and {IMAGES} images each:  {sheets[0].absolute()}")
    print(f"An unseen concept, before and after adding it:  {sheets[1].absolute()}")


def prompt_row(pipe: KnnDiffusion, prompt: str) -> list[Block]:
    out = pipe(prompt, num_images_per_prompt=IMAGES)
    print(f"{out.seconds:5.1f} s  {prompt}")
    return [retrieved(pipe, out), drawn(out)]


def concept_row(pipe: KnnDiffusion, folder: Path) -> list[Block]:
    prompt = folder.name.replace("-", " ")
    before = pipe(prompt, num_images_per_prompt=IMAGES)
    pictures = find_images([folder])
    pipe.index.add([folder])
    after = pipe(prompt, num_images_per_prompt=IMAGES)
    print(f"{before.seconds + after.seconds:5.1f} s  {prompt}: before and after adding {len(pictures)} pictures")
    added = [("added" if number == 0 else "", image.load()) for number, image in enumerate(pictures[:IMAGES])]
    return [added, drawn(before, f"before: {prompt}"), drawn(after, f"after: {prompt}")]


if __name__ == "__main__":
    main()
