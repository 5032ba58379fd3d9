"""`generate` and `edit`: prompts in, images as files and one contact sheet out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knn_diffusion.cli.terminal import JsonOption, answer, growing_folder, progress, say
from knn_diffusion.progress import Progress

if TYPE_CHECKING:
    from knn_diffusion.cli.saving import Saved, Saving
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
    Path | None, typer.Option("--output", help="Folder to add the images to.", show_default="output")
]
SizeOption = Annotated[int | None, typer.Option("--size", help="Side in pixels, 16 to 4096.", show_default="as drawn")]
FormatOption = Annotated[
    str, typer.Option("--format", help="png, webp (up to 512 pixels under 100 kB) or svg (traced, needs vtracer).")
]
BackgroundOption = Annotated[
    str | None,
    typer.Option(
        "--background",
        help="CSS colour name, #rrggbb, or transparent: refuse opaque drawings.",
        show_default="as drawn",
    ),
]
BorderOption = Annotated[bool, typer.Option("--border/--no-border", help="White die-cut border.")]
BorderWidthOption = Annotated[
    float | None,
    typer.Option("--border-width", help="Width of the border as a share of the side, up to 0.2.", show_default="0.03"),
]
ShadowOption = Annotated[bool, typer.Option("--shadow/--no-shadow", help="Soft shadow below.")]
ResamplerOption = Annotated[
    str,
    typer.Option(
        "--resampler", help="crisp, lanczos, or auto: crisp for transparent drawings, Lanczos for opaque ones."
    ),
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
    size: SizeOption = None,
    file_format: FormatOption = "png",
    background: BackgroundOption = None,
    border: BorderOption = False,
    border_width: BorderWidthOption = None,
    shadow: ShadowOption = False,
    resampler: ResamplerOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Draw images for each prompt from the images nearest to it.

    Example: knn-diffusion generate "a red heart" "a cat with a hat" -n 4 --size 512 --format webp --border
    """
    from knn_diffusion.cli.saving import Saved, check_saving
    from knn_diffusion.cli.sheet import drawn, retrieved
    from knn_diffusion.request import check_prompt

    saving = check_saving(
        file_format,
        border_width,
        size=size,
        background=background,
        border=border,
        shadow=shadow,
        resampler=resampler,
    )
    for prompt in prompts:
        check_prompt(prompt)
    made = []
    with growing_folder(output) as folder:
        with progress() as show:
            pipe = _load(model, revision, index, device, exclude, show)
            saving.check(pipe)
            for prompt in prompts:
                saved = Saved(folder, prompt, saving)
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
                    on_image=saved.add,
                )
                result = pipe(prompt, **asked)
                made.append((result, saved, [retrieved(pipe, result), drawn(result, finish=saving.finish)]))
        _say_fewer(pipe, k, made[0][0], as_json)
        _report(made, folder, saving, as_json)


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
    size: SizeOption = None,
    file_format: FormatOption = "png",
    background: BackgroundOption = None,
    border: BorderOption = False,
    border_width: BorderWidthOption = None,
    shadow: ShadowOption = False,
    resampler: ResamplerOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Change an image towards a prompt.

    Example: knn-diffusion edit cat.png "a cat with a hat" --strength 0.6
    """
    from knn_diffusion.cli.saving import Saved, check_saving
    from knn_diffusion.cli.sheet import drawn, retrieved
    from knn_diffusion.images import open_image
    from knn_diffusion.request import check_prompt

    saving = check_saving(
        file_format,
        border_width,
        size=size,
        background=background,
        border=border,
        shadow=shadow,
        resampler=resampler,
    )
    check_prompt(prompt)
    reference = open_image(image)
    with growing_folder(output) as folder:
        with progress() as show:
            pipe = _load(model, revision, index, device, exclude, show)
            saving.check(pipe)
            saved = Saved(folder, prompt, saving)
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
                on_image=saved.add,
            )
            result = pipe.edit(reference, prompt, strength, **asked)
            row = [[("edited", reference)], retrieved(pipe, result), drawn(result, finish=saving.finish)]
        _say_fewer(pipe, k, result, as_json)
        _report([(result, saved, row)], folder, saving, as_json)


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


def _report(made: Sequence[tuple[Output, Saved, list[Block]]], folder: Path, saving: Saving, as_json: bool) -> None:
    from knn_diffusion.cli.sheet import contact_sheet
    from knn_diffusion.images import add_file, png

    sheet = add_file(folder, CONTACT_SHEET, png(contact_sheet([row for _, _, row in made])))
    results = [
        {**output.facts(), **saving.facts(), "images": [str(path) for path in saved.paths], "contact_sheet": str(sheet)}
        for output, saved, _ in made
    ]

    def lines() -> Iterator[str]:
        for output, saved, _ in made:
            yield from map(str, saved.paths)
            if output.shortfall:
                say(f"{output.prompt}: {output.shortfall} of {output.k} neighbors could not be found")
        yield str(sheet)

    answer(results[0] if len(results) == 1 else {"results": results}, as_json, lines)
