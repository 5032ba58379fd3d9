"""`convert` and `assemble`: checkpoints of others become parts, and parts a model."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from knn_diffusion.cli.terminal import JsonOption, answer

INSIDE = "that in DIR"
DENOISERS_OWN = "as in the denoiser's model"


class PartName(StrEnum):
    """The parts that a checkpoint can hold."""

    DENOISER = "denoiser"
    TOKENIZER = "tokenizer"


class Quantizer(StrEnum):
    """How a tokenizer chooses codes where the checkpoint does not tell."""

    NEAREST = "nearest"
    PRODUCT = "product"


def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A .pth, .ckpt, .bin or .safetensors, or a folder of diffusers'; with --codes also a tokenizer of ours.",
            show_default=False,
        ),
    ],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder of the part.", show_default=False)],
    *,
    part: Annotated[
        PartName | None,
        typer.Option("--part", help="Which part of a checkpoint that holds both.", show_default="denoiser"),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(
            "--heads",
            help="Attention heads of a denoiser, where the checkpoint does not tell.",
            min=1,
            show_default="16",
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option("--image-size", help="Side in pixels of a tokenizer's images.", min=1, show_default="256"),
    ] = None,
    quantizer: Annotated[
        Quantizer | None,
        typer.Option("--quantizer", help="How a tokenizer chooses codes: product for IBQ.", show_default="nearest"),
    ] = None,
    codes: Annotated[
        Path | None,
        typer.Option(
            "--codes", help="Keep only these codes of a tokenizer: a file of count-codes or VQ-Diffusion's map."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Turn a checkpoint of VQ-Diffusion or taming-transformers into a part of this package; no code of the file is run.

    Example: knn-diffusion convert coco_pretrained.pth coco/denoiser
    """
    from knn_diffusion.convert.part import convert as write_part

    named: Any = None if part is None else part.value
    product = None if quantizer is None else quantizer is Quantizer.PRODUCT
    made = write_part(checkpoint, folder, part=named, heads=heads, image_size=image_size, product=product, codes=codes)

    def lines() -> Iterator[str]:
        yield f"recognized {made.recognized}: a {made.part} of {made.parameters:,} values, now in {folder}"
        if made.null:
            yield "the condition that it was trained with for guidance lies beside the weights"
        if made.also:
            yield f"the checkpoint also holds a {made.also}: convert it with --part {made.also}"

    answer({"folder": str(folder.absolute()), **made.to_dict()}, as_json, lines)


def assemble(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="New folder, or one that holds some of the parts.", show_default=False),
    ],
    *,
    encoder: Annotated[
        str | None,
        typer.Option("--encoder", help="Registered name, folder, or owner/name on the hub.", show_default=INSIDE),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Its folder, or a model that has it.", show_default=INSIDE)
    ] = None,
    denoiser: Annotated[
        str | None, typer.Option("--denoiser", help="Its folder, or a model that has it.", show_default=INSIDE)
    ] = None,
    index: Annotated[
        str | None,
        typer.Option("--index", help="Images to retrieve from; a model may go without.", show_default=INSIDE),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="What the model is called.", show_default="the folder's name")
    ] = None,
    k: Annotated[
        int | None, typer.Option("-k", help="Neighbors to retrieve.", min=0, show_default=DENOISERS_OWN)
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Denoising steps.", min=1, show_default=DENOISERS_OWN)
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", help="λ of guidance.", show_default=DENOISERS_OWN)
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option("--sampler", help="ancestral, halton or confidence.", show_default=DENOISERS_OWN),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option("--license", help="For the card: mit, cc-by-4.0, …", show_default="the denoiser's, or unknown"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Put a model together from its parts: converted, trained or another model's; they are checked against each other.

    Example: knn-diffusion assemble photos --tokenizer f16 --denoiser run/model --index my-index
    """
    from knn_diffusion.assembly import Drawing, Parts
    from knn_diffusion.assembly import assemble as put_together

    parts = Parts(encoder=encoder, tokenizer=tokenizer, denoiser=denoiser, index=index)
    drawing = Drawing(k=k, num_steps=steps, guidance_scale=guidance_scale, order=sampler)
    made = put_together(folder, parts, name=name, drawing=drawing, license=license)

    def lines() -> Iterator[str]:
        reads = "the text" if made.reads_text else f"the text and {made.k} neighbors"
        held = "no index" if made.images is None else f"an index of {made.images:,} images"
        yield f"the model {made.name} in {folder}, with {held}: reads {reads}, draws in {made.sampler.num_steps} steps"
        if made.images is None and not made.reads_text:
            yield "it has no images to retrieve from: name an index when you draw (--index), or put one in"

    answer({**made.to_dict(), "model": str(made.model)}, as_json, lines)
