"""`index rule`: when a search takes two images for the same picture, shown or set."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from knn_diffusion.cli.index import IndexArgument, changeable, rule_in_words
from knn_diffusion.cli.terminal import JsonOption, answer
from knn_diffusion.errors import UsageError


def rule(
    index: IndexArgument,
    *,
    cosine: Annotated[
        float | None, typer.Option("--cosine", help="Copies lie above this cosine of their embeddings, up to 1.")
    ] = None,
    manhattan: Annotated[
        float | None, typer.Option("--manhattan", help="Or their 8×8 pictures differ by at most so many levels of 255.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure the cosine on the pictures there are now.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show when a search takes two images for copies and leaves one out, or set it.

    Training follows the same rule: an image is never its own neighbor, nor is a copy of it.

    Example: knn-diffusion index rule my-index --cosine 0.93
    """
    from knn_diffusion.config import to_dict
    from knn_diffusion.image_index import ImageIndex

    if calibrate and cosine is not None:
        raise UsageError("expected --cosine or --calibrate, got both: leave one out")
    given = {"cosine": cosine, "manhattan": manhattan}
    asked = {name: value for name, value in given.items() if value is not None}
    with changeable(index) if asked or calibrate else ImageIndex.open(index, read_only=True) as opened:
        made = replace(opened.calibrated_rule() if calibrate else opened.rule, **asked)
        if made != opened.rule:
            opened.set_rule(made)
        words = rule_in_words(made.cosine, made.manhattan)
    answer(to_dict(made), as_json, lambda: iter([f"copies: {words}"]))
