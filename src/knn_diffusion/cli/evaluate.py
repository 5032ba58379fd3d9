"""`evaluate images | stickers`: figures on pictures and on models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from knn_diffusion.cli.draw import MODELS_OWN, RevisionOption
from knn_diffusion.cli.terminal import JsonOption, answer, new_folder, progress, say

app = typer.Typer(help="Measure pictures and models.")

DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, …")]


@app.callback()
def evaluate() -> None:
    """Measure pictures and models."""


@app.command("images")
def images(
    drawn: Annotated[
        str,
        typer.Argument(
            metavar="DRAWN",
            help="Drawings: a folder, tar shard, parquet table or .npz of features.",
            show_default=False,
        ),
    ],
    reference: Annotated[
        str, typer.Argument(metavar="REFERENCE", help="Real pictures, in the same forms.", show_default=False)
    ],
    *,
    features: Annotated[
        str | None,
        typer.Option(
            "--features",
            help="Network whose features are compared: judge (stickers), encoder, efficientnet, dinov2, clip.",
            show_default="judge, or the network of two feature files",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option("--weights", help="Its folder; judge and encoder have bundled ones.", show_default="bundled"),
    ] = None,
    resamples: Annotated[
        int | None,
        typer.Option("--resamples", help="Bootstrap draws for FD and FD∞.", show_default="100, 20 if wide"),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of resampling.")] = 0,
    output: Annotated[
        Path | None, typer.Option("--output", help="New folder for report.md, report.json and both sides' features.")
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Compare drawings with real pictures: FD, FD∞, KID, CMMD, precision, recall, density, coverage.

    Example: knn-diffusion evaluate images drawings/ photos/ --features dinov2 --weights dinov2-base/
    """
    from knn_diffusion.device import choose_device
    from knn_diffusion.evaluation.comparison import ComparisonConfig, compare
    from knn_diffusion.evaluation.features import load_extractor
    from knn_diffusion.evaluation.sides import is_feature_file

    settings = ComparisonConfig(resamples=resamples, seed=seed)
    from_files = is_feature_file(drawn) and is_feature_file(reference)
    wanted = features or (None if from_files and weights is None else "judge")
    extractor = None if wanted is None else load_extractor(wanted, weights, choose_device(device))
    folder = None if output is None else new_folder(output)
    with progress() as show:
        made = compare(drawn, reference, extractor, folder, settings=settings, progress=show)
    for notice in made.sections[0].details["notices"]:
        say(f"note: {notice}")
    answer(made.to_dict(), as_json, lambda: iter([made.to_table()]))


@app.command("stickers")
def stickers(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Bundled name, model folder or owner/name on the hub.")
    ] = "stickers",
    *,
    revision: RevisionOption = None,
    index: Annotated[
        str | None,
        typer.Option(
            "--index", help="Images to retrieve from, instead of the model's own: folder, bundled name, owner/name."
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="A protocol: understands, draws, adapts, frechet, pictures; repeatable."),
    ] = None,
    num_prompts: Annotated[int, typer.Option("--num-prompts", help="Prompts the judge grades.")] = 200,
    num_distance: Annotated[int, typer.Option("--num-distance", help="Pictures on each side of a distance.")] = 1000,
    k: Annotated[int | None, typer.Option("-k", help="Neighbors to retrieve.", show_default=MODELS_OWN)] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Denoising steps.", show_default=MODELS_OWN)] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option("--guidance-scale", help="λ of classifier-free guidance.", show_default=MODELS_OWN),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Prompts and drawings follow from it.")] = 0,
    judge: Annotated[
        Path | None, typer.Option("--judge", help="Folder of the judge, instead of the bundled one.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="New folder for report.md, report.json, pictures.")
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure a model of stickers: is the text understood, is what is asked drawn, does it adapt without training.

    Example: knn-diffusion evaluate stickers my-run/model --only understands --only draws
    """
    from knn_diffusion.evaluation import protocols
    from knn_diffusion.pipeline import KnnDiffusion

    settings = protocols.EvaluationConfig(
        num_prompts=num_prompts,
        num_distance=num_distance,
        seed=seed,
        k=k,
        num_steps=steps,
        guidance_scale=guidance_scale,
    )
    folder = None if output is None else new_folder(output)
    with progress() as show:
        pipe: Any = KnnDiffusion.from_pretrained(model, index=index, revision=revision, device=device)
        made = protocols.evaluate(pipe, judge, folder, only=only, progress=show, config=settings)
    answer(made.to_dict(), as_json, lambda: iter([made.to_markdown()]))
