"""`index push`: copy an index into a Milvus collection, where many machines can search it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from knn_diffusion.cli.index import IndexArgument
from knn_diffusion.cli.terminal import JsonOption, answer, progress
from knn_diffusion.errors import UsageError


def push(
    index: IndexArgument,
    uri: Annotated[
        str, typer.Argument(metavar="URI", help="http://host:port, or a file ending in .db.", show_default=False)
    ],
    *,
    collection: Annotated[
        str | None, typer.Option("--collection", help="Name in Milvus; made from the index's name.")
    ] = None,
    token_env: Annotated[
        str | None, typer.Option("--token-env", metavar="VAR", help="Environment variable that holds the token.")
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="Longest wait for each call.")] = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Copy the images of an index into a Milvus collection; pushed again, it sends what is missing there.

    Example: knn-diffusion index push my-index http://milvus:19530 --token-env MILVUS_TOKEN
    """
    from knn_diffusion.image_index import ImageIndex
    from knn_diffusion.retrieval import milvus
    from knn_diffusion.retrieval.store import Store

    token = _token(token_env)
    with ImageIndex.open(index, read_only=True) as opened:
        folder, rule = opened.folder, opened.rule
    assert folder is not None
    name = collection or milvus.collection_name(Path(index).name)
    settings = milvus.MilvusConfig(timeout_seconds=timeout)
    with Store.open(folder, read_only=True) as store, progress() as show:
        identity = store.encoder
        with milvus.MilvusRetriever.create(
            uri, name, identity, token=token, settings=settings, rule=rule, exist_ok=True
        ) as there:
            report, place = milvus.push(store, there, show), there.uri
    result = {**asdict(report), "uri": place, "collection": name, "encoder": identity.name, "dim": identity.dim}

    def lines() -> Iterator[str]:
        yield f"sent {report.sent:,}, present before {report.already_present:,}"
        yield f"{report.in_collection:,} images in collection {name} at {place}, {report.in_store:,} in {index}"

    answer(result, as_json, lines)


def _token(variable: str | None) -> str | None:
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise UsageError(f"expected the token in the environment variable {variable}, it is not set: export it first")
    return os.environ[variable]
