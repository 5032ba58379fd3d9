"""`train encoder | tokenizer | denoiser`: each of the three parts, from images, in resumable slices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knn_diffusion.cli.configuration import chosen_run
from knn_diffusion.cli.terminal import JsonOption, answer, progress, say, seldom
from knn_diffusion.errors import UsageError

if TYPE_CHECKING:
    from knn_diffusion.training.loop import TrainingResult
    from knn_diffusion.training.options import RunOptions, StepProgress

app = typer.Typer(help="Train the parts of a model; the same command with --resume goes on where it stopped.")


@app.callback()
def train() -> None:
    """Train the parts of a model; the same command with --resume goes on where it stopped."""


ImagesOption = Annotated[
    list[str] | None, typer.Option("--images", help="Folders, files, tar shards, parquet; several.")
]
OutputOption = Annotated[Path, typer.Option("--output", help="Folder of the run.", show_default=False)]
PresetOption = Annotated[str | None, typer.Option("--preset", help="A complete configuration by name.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="A configuration file, .toml or .json.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Change one value: training.num_steps=1000; repeatable.")
]
InitOption = Annotated[str | None, typer.Option("--init", help="Bundled name or model folder to go on from.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in --output.")]


def _above_zero(minutes: float | None) -> float | None:
    if minutes is not None and not minutes > 0:
        raise UsageError(
            f"expected --max-minutes above 0, got {minutes:g}: give minutes, or leave it out to train to the end"
        )
    return minutes


MinutesOption = Annotated[
    float | None,
    typer.Option("--max-minutes", help="Stop after a checkpoint at this time.", callback=_above_zero),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, …")]


@app.command()
def encoder(
    *,
    output: OutputOption,
    images: ImagesOption = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    changes: SetOption = None,
    init: InitOption = None,
    resume: ResumeOption = False,
    max_minutes: MinutesOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train the joint text-image encoder on captioned pictures; it alone reads captions, as CLIP did.

    Example: knn-diffusion train encoder --preset stickers --images data/encoder --set backbone=runs/backbone --output runs/encoder
    """
    from knn_diffusion.presets import ENCODERS
    from knn_diffusion.training.encoder import train_encoder

    sources = _required(images)
    run = chosen_run("encoder", ENCODERS, preset=preset, file=config, changes=changes, init=init)
    with _watched("encoder", output, resume=resume, max_minutes=max_minutes, device=device) as options:
        result = train_encoder(run, sources, options, init=init)
    _report("encoder", output, result, as_json)


@app.command()
def tokenizer(
    *,
    images: ImagesOption = None,
    output: OutputOption,
    preset: PresetOption = None,
    config: ConfigOption = None,
    changes: SetOption = None,
    init: InitOption = None,
    backbone: Annotated[
        Path | None, typer.Option("--backbone", help="Folder of a pretrained backbone, for loss.backbone_weight.")
    ] = None,
    resume: ResumeOption = False,
    max_minutes: MinutesOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train the image tokenizer on images without captions.

    Example: knn-diffusion train tokenizer --preset stickers-cpu --images data/stickers --output runs/tokenizer
    """
    from knn_diffusion.presets import TOKENIZERS
    from knn_diffusion.training.tokenizer import train_tokenizer

    sources = _required(images)
    run = chosen_run("tokenizer", TOKENIZERS, preset=preset, file=config, changes=changes, init=init)
    with _watched("tokenizer", output, resume=resume, max_minutes=max_minutes, device=device) as options:
        result = train_tokenizer(run, sources, options, init=init, backbone=backbone)
    _report("tokenizer", output, result, as_json)


@app.command()
def denoiser(
    *,
    images: ImagesOption = None,
    output: OutputOption,
    index: Annotated[
        str,
        typer.Option(
            "--index",
            help="Index with the neighbors of the images: folder, bundled name, owner/name.",
            show_default=False,
        ),
    ],
    tokenizer: Annotated[Path | None, typer.Option("--tokenizer", help="Folder of a trained tokenizer.")] = None,
    tokens: Annotated[
        Path | None,
        typer.Option("--tokens", help="Folder of tokens, as index build made it; without --images all of it."),
    ] = None,
    preset: PresetOption = None,
    config: ConfigOption = None,
    changes: SetOption = None,
    init: InitOption = None,
    resume: ResumeOption = False,
    max_minutes: MinutesOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Train the denoiser on images without captions and their neighbors in an index.

    On several GPUs start it by torchrun --nproc-per-node GPUS -m knn_diffusion train denoiser, with the same options.

    Example: knn-diffusion train denoiser --init stickers --index my-index --images photos --output runs/mine
    """
    from knn_diffusion.image_index import ImageIndex
    from knn_diffusion.presets import DENOISERS
    from knn_diffusion.training.denoiser import train_denoiser

    sources = images or [] if tokens is not None else _required(images)
    run = chosen_run("denoiser", DENOISERS, preset=preset, file=config, changes=changes, init=init)
    with _watched("denoiser", output, resume=resume, max_minutes=max_minutes, device=device) as options:
        result = train_denoiser(
            run, sources, ImageIndex.open(index), options, tokenizer=tokenizer, tokens=tokens, init=init
        )
    _report("denoiser", output, result, as_json)


def _required(images: list[str] | None) -> list[str]:
    if not images:
        raise UsageError("expected --images with folders, files or shards to train on, got none: add --images FOLDER")
    return images


@contextmanager
def _watched(part: str, output: Path, **asked: Any) -> Iterator[RunOptions]:
    """What was asked of a run, and whom to tell of it: of the preparation, of the steps, and lines to read."""
    from knn_diffusion.training.options import RunOptions
    from knn_diffusion.training.processes import is_first

    if not is_first():
        yield RunOptions(output=output, **asked)
        return
    due, first = seldom(), 0
    with progress() as show:

        def report(what: str, done: int, total: int) -> None:
            show(what, done, total)
            if due():
                say(f"{what}: {done:,} of {total:,}")

        def watch(step: StepProgress) -> None:
            nonlocal first
            first = first or step.step
            show(f"training the {part}", step.step, step.num_steps)
            if due():
                say(step_line(part, step, step.step - first + 1))

        yield RunOptions(output=output, report=report, watch=watch, notice=say, **asked)


def step_line(part: str, step: StepProgress, made: int) -> str:
    """How far training is; `made` steps took the seconds so far."""
    losses = [f", loss {value:.4g}" for name, value in step.metrics.items() if name.endswith("/loss")]
    minutes = step.seconds / made * (step.num_steps - step.step) / 60
    left = f"about {minutes:.0f} min" if minutes >= 1 else "less than a minute"
    return f"training the {part}: step {step.step:,} of {step.num_steps:,}{''.join(losses[:1])}, {left} left"


def _report(part: str, output: Path, result: TrainingResult, as_json: bool) -> None:
    from knn_diffusion.training.processes import is_first

    if not is_first():
        return
    model = output.absolute() / "model"
    found = {
        "part": part,
        "model": str(model),
        "step": result.step,
        "finished": result.finished,
        "metrics": result.metrics,
    }

    def lines() -> Iterator[str]:
        state = f"complete at step {result.step}" if result.finished else f"step {result.step}: go on with --resume"
        yield f"{part} in {model}, {state}"
        yield from (f"  {name}: {value:.4g}" for name, value in result.metrics.items())

    answer(found, as_json, lines)
