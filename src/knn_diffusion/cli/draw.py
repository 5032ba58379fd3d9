"""`generate` and `edit`: prompts in, PNG files and one contact sheet out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knn_diffusion.cli.terminal import JsonOption, answer, new_folder, progress, say
from knn_diffusion.progress import Progress

if TYPE_CHECKING:
    from knn_diffusion.cli.sheet import Block
    from knn_diffusion.pipeline import KnnDiffusion
    from knn_diffusion.request import Output, Settings

CONTACT_SHEET = "contact-sheet.png"
MODELS_OWN = "the model's"

ModelOption = Annotated[str, typer.Option("--model", help="Bundled name, model folder or owner/name on the hub.")]
RevisionOption = Annotated[
    str | None, typer.Option("--revision", help="Branch, tag or commit of a model of the hub.", show_default="main")
]
IndexOption = Annotated[
    str | None,
    typer.Option(
        "--index", help="Images to retrieve from, instead of the model's own: folder, bundled name, owner/name."
    ),
]
ImagesOption = Annotated[int, typer.Option("--num-images", "-n", help="Images for each prompt.")]
NeighborsOption = Annotated[int | None, typer.Option("-k", help="Neighbors to retrieve.", show_default=MODELS_OWN)]
StepsOption = Annotated[int | None, typer.Option("--steps", help="Denoising steps.", show_default=MODELS_OWN)]
GuidanceOption = Annotated[
    float | None,
    typer.Option("--guidance-scale", help="λ: 1 is no guidance, the paper uses 8.", show_default=MODELS_OWN),
]
SamplerOption = Annotated[
    str | None, typer.Option("--sampler", help="ancestral, halton or confidence.", show_default=MODELS_OWN)
]
SeedOption = Annotated[int, typer.Option("--seed", help="Same seed, same pixels.")]
ExcludeOption = Annotated[
    list[str] | None, typer.Option("--exclude", help="Id of an image not to retrieve; repeatable.")
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", help="New folder for the images.", show_default="output, then output-2, …"),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, …")]


def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="What to draw.", show_default=False)],
    *,
    model: ModelOption = "stickers",
    revision: RevisionOption = None,
    index: IndexOption = None,
    num_images: ImagesOption = 1,
    k: NeighborsOption = None,
    steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    sampler: SamplerOption = None,
    seed: SeedOption = 0,
    exclude: ExcludeOption = None,
    output: OutputOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Draw images for each prompt from the images nearest to it.

    Example: knn-diffusion generate "a red heart" "a cat with a hat" -n 4 --output hearts
    """
    from knn_diffusion.cli.sheet import drawn, retrieved
    from knn_diffusion.request import check_prompt

    folder = new_folder(output)
    for prompt in prompts:
        check_prompt(prompt)
    made = []
    with progress() as show:
        pipe = _load(model, revision, index, device, exclude, show)
        for number, prompt in enumerate(prompts):
            asked = _settings(
                show,
                prompt,
                num_images_per_prompt=num_images,
                k=k,
                guidance_scale=guidance_scale,
                num_inference_steps=steps,
                sampler=sampler,
                seed=seed,
                exclude_ids=exclude,
            )
            result = pipe(prompt, **asked)
            made.append((result, _save(number, result, folder), [retrieved(pipe, result), drawn(result)]))
    _say_fewer(pipe, k, made[0][0], as_json)
    _report(made, folder, as_json)


def edit(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The image to change.", show_default=False)],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What it should become.", show_default=False)],
    *,
    strength: Annotated[float, typer.Option("--strength", help="0 leaves the image as it is, 1 starts anew.")] = 0.6,
    model: ModelOption = "stickers",
    revision: RevisionOption = None,
    index: IndexOption = None,
    num_images: ImagesOption = 1,
    k: NeighborsOption = None,
    steps: StepsOption = None,
    guidance_scale: GuidanceOption = None,
    sampler: SamplerOption = None,
    seed: SeedOption = 0,
    exclude: ExcludeOption = None,
    output: OutputOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Change an image towards a prompt.

    Example: knn-diffusion edit cat.png "a cat with a hat" --strength 0.6
    """
    from knn_diffusion.cli.sheet import drawn, retrieved
    from knn_diffusion.images import open_image
    from knn_diffusion.request import check_prompt

    folder = new_folder(output)
    check_prompt(prompt)
    reference = open_image(image)
    with progress() as show:
        pipe = _load(model, revision, index, device, exclude, show)
        asked = _settings(
            show,
            prompt,
            num_images_per_prompt=num_images,
            k=k,
            guidance_scale=guidance_scale,
            num_inference_steps=steps,
            sampler=sampler,
            seed=seed,
            exclude_ids=exclude,
        )
        result = pipe.edit(reference, prompt, strength, **asked)
        row = [[("edited", reference)], retrieved(pipe, result), drawn(result)]
        made = [(result, _save(0, result, folder), row)]
    _say_fewer(pipe, k, result, as_json)
    _report(made, folder, as_json)


def _load(
    model: str, revision: str | None, index: str | None, device: str, exclude: list[str] | None, show: Progress
) -> KnnDiffusion:
    from knn_diffusion.pipeline import KnnDiffusion

    show("loading the model", 0, 1)
    pipe = KnnDiffusion.from_pretrained(model, index=index, revision=revision, device=device)
    show("loading the model", 1, 1)
    if exclude:
        pipe.index.sources(exclude)  # an unknown id is an error
    return pipe


def _say_fewer(pipe: KnnDiffusion, k: int | None, output: Output, as_json: bool) -> None:
    """A line where the index is too small for the model's own k."""
    if k is None and output.k < pipe.model.k and not as_json:
        say(f"the index holds {output.k} images: -k is {output.k}, not the model's {pipe.model.k}")


def _settings(show: Progress, prompt: str, **asked: Any) -> Settings:
    """The options that were given, as the pipeline takes them."""
    given: Any = {name: value for name, value in asked.items() if value is not None}
    given["callback"] = lambda passed: show(f"drawing {prompt[:40]}", passed.done, passed.total)
    return given


def _save(number: int, output: Output, folder: Path) -> list[Path]:
    """Write one prompt's images, each with its settings inside, as soon as they are drawn."""
    from knn_diffusion.images import save_png

    paths = []
    for i, image in enumerate(output.images):
        paths.append(folder / f"{number:03d}-{slug(output.prompt)}-{i}.png")
        save_png(image, paths[-1], {**output.facts(), "image": i})
    return paths


def _report(made: Sequence[tuple[Output, list[Path], list[Block]]], folder: Path, as_json: bool) -> None:
    from knn_diffusion.cli.sheet import contact_sheet
    from knn_diffusion.images import save_png

    sheet = folder / CONTACT_SHEET
    save_png(contact_sheet([row for _, _, row in made]), sheet)
    results = [
        {**output.facts(), "images": [str(path) for path in paths], "contact_sheet": str(sheet)}
        for output, paths, _ in made
    ]

    def lines() -> Iterator[str]:
        for output, paths, _ in made:
            yield from map(str, paths)
            if output.shortfall:
                say(f"{output.prompt}: {output.shortfall} of {output.k} neighbors could not be found")
        yield str(sheet)

    answer(results[0] if len(results) == 1 else {"results": results}, as_json, lines)


def slug(prompt: str) -> str:
    """A prompt as part of a file name: lower-case words joined by hyphens, at most 40 characters."""
    words = re.sub(r"[^\w]+", "-", prompt.lower()).strip("-")
    return words[:40].strip("-") or "prompt"
