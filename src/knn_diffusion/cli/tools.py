"""`push`, `dataset stickers` and `doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from knn_diffusion.cli.terminal import JsonOption, answer, progress
from knn_diffusion.errors import UsageError

ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Bundled name, model folder or owner/name on the hub.", show_default=False),
]
dataset_app = typer.Typer(help="Make data sets.")


class Split(StrEnum):
    """The parts of the sticker world."""

    TRAIN = "train"
    HELD_OUT = "held-out"
    ALL = "all"


class Purpose(StrEnum):
    """What a folder of stickers is for."""

    TRAIN = "train"
    ENCODER = "encoder"
    NEIGHBORS = "neighbors"
    INDEX = "index"
    HELD_OUT = "held-out"
    HELD_OUT_FAMILY = "held-out-family"


@dataset_app.callback()
def dataset() -> None:
    """Make data sets."""


@dataset_app.command("stickers")
def stickers(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="New folder, or one to go on with.", show_default=False)
    ],
    *,
    count: Annotated[
        int | None,
        typer.Option("--count", "-n", help="Pictures to draw.", min=1, show_default="10000, or as many as --for has"),
    ] = None,
    size: Annotated[
        int | None, typer.Option("--size", help="Side in pixels.", min=8, max=1024, show_default="64, with --art 128")
    ] = None,
    art: Annotated[
        Path | None, typer.Option("--art", help="Folder of sticker art; default: the colour emoji font.")
    ] = None,
    purpose: Annotated[Purpose, typer.Option("--for", help="With --art: what the stickers are for.")] = Purpose.TRAIN,
    split: Annotated[Split, typer.Option("--split", help="Which concepts to draw.")] = Split.TRAIN,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same pictures.")] = 0,
    processes: Annotated[int, typer.Option("--processes", help="Drawing at once.", min=1)] = 1,
    as_json: JsonOption = False,
) -> None:
    """Draw sticker scenes, from the colour emoji font or from a folder of art; captions go to captions.jsonl.

    Example: knn-diffusion dataset stickers data/stickers --art recipes/runs/art --for train
    """
    from knn_diffusion.stickers.art import open_art
    from knn_diffusion.stickers.dataset import make_dataset
    from knn_diffusion.stickers.datasets import make_stickers

    with progress() as show:
        if art is None:
            count, size = count or 10_000, size or 64
            made = make_dataset(
                folder, count, seed=seed, size=size, split=split.value, processes=processes, progress=show
            )
            kind = split.value
        else:
            size, kind = size or 128, purpose.value
            made = make_stickers(
                folder,
                purpose.value,
                open_art(art),
                count=count,
                seed=seed,
                size=size,
                processes=processes,
                progress=show,
            )
            count = sum(1 for _ in made.glob("*.png"))
    result = {"folder": str(made.absolute()), "count": count, "size": size, "split": kind, "seed": seed}
    answer(result, as_json, lambda: iter([f"{count:,} pictures in {made}"]))


def push(
    model: ModelArgument,
    repository: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="Repository on the hub, made if need be.", show_default=False)
    ],
    *,
    index: Annotated[
        str | None, typer.Option("--index", help="Images to send along, instead of the model's own.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Let only its owner see a new repository.")] = False,
    revision: Annotated[
        str | None, typer.Option("--revision", help="An existing branch to send to.", show_default="main")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Send a model with its index and card to the Hugging Face hub; everybody can then draw with --model OWNER/NAME.

    Example: knn-diffusion push my-run/model me/my-stickers --index my-index
    """
    from knn_diffusion.hub import check_hub_id
    from knn_diffusion.pipeline import KnnDiffusion
    from knn_diffusion.retrieval.identity import DATABASE

    check_hub_id(repository)
    if (Path(model) / DATABASE).is_file():
        raise UsageError(
            f"expected a model to send, {model} is an index: send it along with one (--index), or alone with "
            f"`hf upload {repository} {model}`"
        )
    pipe = KnnDiffusion.from_pretrained(model, index=index, device="cpu")
    place = pipe.push_to_hub(repository, private=private, revision=revision)
    answer({"repository": repository, "url": place}, as_json, lambda: iter([place]))


def doctor(as_json: JsonOption = False) -> None:
    """Say what is installed, what is missing, and the command that mends it.

    Example: knn-diffusion doctor --json
    """
    from knn_diffusion.doctor import examine, report

    findings = examine()
    result = report(findings)

    def lines() -> Iterator[str]:
        width = max(len(finding.name) for finding in findings)
        for finding in findings:
            yield f"{finding.status:8}  {finding.name:{width}}  {finding.found}"
            if finding.cure:
                yield f"{'':{width + 10}} -> {finding.cure}"

    answer(result, as_json, lines)
    if not result["ok"]:
        raise typer.Exit(1)
