"""What `generate` and `edit` write: each drawing as soon as it is drawn, in the kind and finish that were asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knn_diffusion.cli.terminal import say
from knn_diffusion.errors import UsageError
from knn_diffusion.images import (
    OPAQUE,
    FileFormat,
    Finish,
    NumberedFiles,
    check_finish,
    check_format,
    encode,
    require_tracing,
)
from knn_diffusion.pipeline import KnnDiffusion
from knn_diffusion.request import Output


@dataclass(frozen=True, kw_only=True, slots=True)
class Saving:
    """Kind and finish of the files of a command."""

    file_format: FileFormat
    finish: Finish

    def check(self, pipe: KnnDiffusion) -> None:
        """Raise a UsageError, before anything is drawn, where this model's drawings cannot be finished so."""
        if self.finish.needs_transparency and not pipe.transparent:
            raise UsageError(OPAQUE)

    def facts(self) -> dict[str, Any]:
        """What was asked for, as plain values; nothing where files are as they always were."""
        finish = {} if self.finish.plain else {"finish": self.finish.facts()}
        return finish if self.file_format == "png" else {"format": self.file_format, **finish}


def check_saving(file_format: str, border_width: float | None, **finishing: Any) -> Saving:
    """Check the options of a command; the last are those of `images.Finishing`.

    Raises: UsageError naming the wrong one; MissingDependencyError for SVG without vtracer.
    """
    wanted = check_format(file_format)
    if wanted == "svg":
        require_tracing()
    options: Any = finishing if border_width is None else {**finishing, "border": border_width}
    return Saving(file_format=wanted, finish=check_finish(options))


class Saved:
    """The files of one prompt; `add` is what the pipeline calls with each drawing."""

    def __init__(self, folder: Path, prompt: str, saving: Saving) -> None:
        self.paths: list[Path] = []
        self._files, self._saving = NumberedFiles(folder, prompt), saving

    def add(self, image: int, output: Output) -> None:
        """Write one drawing under a new name."""
        made = encode(
            output.images[0], output.settings(image), file_format=self._saving.file_format, finish=self._saving.finish
        )
        self.paths.append(self._files.add(image, made.suffix, made.content))
        if made.reduced:
            kilobytes = len(made.content) / 1000
            say(f"{self.paths[-1].name}: quality {made.quality} instead of 90, {kilobytes:.0f} kB")
