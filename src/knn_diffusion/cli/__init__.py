"""The command line: arguments become calls, errors become one line and an exit code.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
Exit codes: 0 success, 1 failure, 2 wrong use, 130 interrupted.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from knn_diffusion import __version__
from knn_diffusion.cli import (
    draw,
    evaluate,
    index,
    index_compact,
    index_dedup,
    index_exchange,
    index_push,
    index_remove,
    index_rule,
    index_search,
    index_tune,
    parts,
    tokenizer,
    tools,
    train,
)
from knn_diffusion.cli.terminal import open_missing_streams, say
from knn_diffusion.errors import KnnDiffusionError, PeerError

app = typer.Typer(
    name="knn-diffusion",
    help="Turn a pile of images without captions into a text-to-image generator.",
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(draw.generate)
app.command("edit")(draw.edit)
index.app.command()(index_remove.remove)
index.app.command()(index_remove.sync)
index.app.command()(index_search.search)
index.app.command()(index_tune.tune)
index.app.command()(index_tune.report)
index_exchange.register(index.app)
index.app.command()(index_dedup.dedup)
index.app.command()(index_rule.rule)
index.app.command()(index_compact.compact)
index.app.command()(index_push.push)
app.add_typer(index.app, name="index")
app.add_typer(train.app, name="train")
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(evaluate.app, name="evaluate")
app.command("push")(tools.push)
app.add_typer(tools.dataset_app, name="dataset")
app.command("convert")(parts.convert)
app.command("assemble")(parts.assemble)
app.command("doctor")(tools.doctor)

# typer ≥ 0.26 carries its own click, older ones use the package: both are reached through the class typer exports.
_ClickException: type[Exception] = typer.BadParameter.__mro__[2]
_MANY_VALUES = ("--images",)
INTERRUPTED = "interrupted: everything saved so far is kept"


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    """Turn a pile of images without captions into a text-to-image generator."""
    if version:
        typer.echo(f"knn-diffusion {__version__}")
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; expected failures are one line on standard error."""
    open_missing_streams()
    given = spread_values(sys.argv[1:] if arguments is None else arguments)
    if not given or (len(given) == 1 and given[0] in {group.name for group in app.registered_groups}):
        given = [*given, "--help"]
    try:
        code = int(app(args=given, prog_name="knn-diffusion", standalone_mode=False) or 0)
        return _fail(INTERRUPTED, code) if code == 130 else code  # newer typer turns Ctrl-C into this code itself
    except PeerError as error:  # the process that had the error has said it
        return error.exit_code
    except KnnDiffusionError as error:
        return _fail(str(error), error.exit_code)
    except _ClickException as error:
        return _fail(f"{error.format_message().rstrip('.')}: see --help", 2)  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        return _fail(INTERRUPTED, 130)
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone; a second message about it helps nobody
        return 1
    except OSError as error:
        return _fail(_describe(error), 1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for its name
            raise
        return _fail("memory ran out on the GPU: free it of other programs, or compute on --device cpu", 1)


def spread_values(arguments: Sequence[str]) -> list[str]:
    """Let `--images a b c` mean `--images a --images b --images c`, as shells expand `--images *.png`."""
    spread: list[str] = []
    option = None
    for argument in arguments:
        if argument.startswith("-"):
            name = argument.partition("=")[0]
            option = name if name in _MANY_VALUES else None
        elif option is not None and spread[-1] != option:
            spread.append(option)
        spread.append(argument)
    return spread


def _describe(error: OSError) -> str:
    place = f"{error.filename}: " if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"{place}the disk is full: free space or choose another place; everything saved before is kept"
    return f"{place}{error.strerror or error}: check the path and its permissions"


def _fail(message: str, code: int) -> int:
    say("error: " + " ".join(message.split()))
    return code
