"""`tokenizer count-codes | check-tokens`: which codes of a tokenizer one's images use, and whether kept tokens are sound."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from knn_diffusion.cli.terminal import JsonOption, answer, progress, say
from knn_diffusion.errors import StoreError, UsageError

PROBLEMS = 10
"""At most so many are named."""

app = typer.Typer(help="Look into a tokenizer, and into what it made.")


@app.callback()
def tokenizer() -> None:
    """Look into a tokenizer, and into what it made."""


@app.command("count-codes")
def count_codes(
    folder: Annotated[Path, typer.Argument(metavar="TOKENIZER", help="Folder of a tokenizer.", show_default=False)],
    *,
    images: Annotated[
        list[str] | None, typer.Option("--images", help="Folders, files, tar shards, parquet; several.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="New file for the list.", show_default=False)],
    min_count: Annotated[int, typer.Option("--min-count", help="Keep codes used so many times.", min=1)] = 1,
    share: Annotated[float, typer.Option("--share", help="Keep the most used codes up to this share of all uses.")] = 1,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, …")] = "auto",
    as_json: JsonOption = False,
) -> None:
    """Count the codes that images use and list those to keep, for `convert --codes`.

    Example: knn-diffusion tokenizer count-codes openimages/tokenizer --images photos --output codes.safetensors
    """
    from knn_diffusion.convert.codes import choose, write_used_codes
    from knn_diffusion.device import choose_device
    from knn_diffusion.models.tokenizer import codebook_perplexity
    from knn_diffusion.models.tokenizers import load_tokenizer
    from knn_diffusion.training.code_counts import count_codes as count

    if not images:
        raise UsageError("expected --images with folders, files or shards to count on, got none: add --images FOLDER")
    if not 0 < share <= 1:
        raise UsageError(f"expected --share above 0 and at most 1, got {share:g}: 1 keeps every code that is used")
    if output.exists():
        raise UsageError(f"expected a new file for --output, {output} is there already: choose another name")
    with progress() as show:
        loaded, _ = load_tokenizer(folder)
        made = count(loaded.to(choose_device(device)), images, show, say)
    used = choose(made.counts, min_count=min_count, share=share)
    write_used_codes(output, used, made.counts)
    found = {
        "codes": str(output.absolute()),
        "kept": len(used),
        "used": int((made.counts > 0).sum()),
        "vocab_size": len(made.counts),
        "share": float(made.counts[used].sum() / made.counts.sum()),
        "perplexity": codebook_perplexity(made.counts.float()),
        "images": made.images,
        "skipped": made.skipped,
    }

    def lines() -> Iterator[str]:
        yield (
            f"{found['used']:,} of {found['vocab_size']:,} codes are used by {made.images:,} images, "
            f"as evenly as {found['perplexity']:,.0f} would be"
        )
        yield f"{len(used):,} of them, {found['share']:.2%} of all uses, are listed in {output}"

    answer(found, as_json, lines)


@app.command("check-tokens")
def check_tokens(
    folder: Annotated[Path, typer.Argument(metavar="TOKENS", help="Folder of tokens.", show_default=False)],
    *,
    as_json: JsonOption = False,
) -> None:
    """Verify every digest of a folder of tokens; exit code 0 only when it is sound.

    Example: knn-diffusion tokenizer check-tokens my-tokens
    """
    from knn_diffusion.tokens import TokenFolder

    tokens = TokenFolder.there(folder)
    with progress() as show:
        problems = tokens.problems(show)
    if problems:
        raise StoreError(
            f"{folder} is not sound: {'; '.join(problems[:PROBLEMS])}{' …' if len(problems) > PROBLEMS else ''}: delete the "
            ".json of these units in units/ and give the commands that made them again"
        )
    examples, makers = tokens.examples(), tokens.makers
    found = {
        "sound": True,
        "units": len(tokens.units()),
        "images": len(examples),
        "skipped": len(examples.skipped),
        "tokens_per_image": makers.seq,
        "vocab_size": makers.vocab_size,
        "dim": makers.dim,
        "encoder": makers.encoder,
        "tokenizer": makers.tokenizer,
    }

    def lines() -> Iterator[str]:
        yield f"sound, {found['images']:,} images of {found['units']:,} shards or groups of files, {found['skipped']:,} skipped"
        yield f"{makers.seq:,} tokens of {makers.vocab_size:,} codes an image, embeddings of {makers.dim} numbers"

    answer(found, as_json, lines)
