"""Other libraries in the same run: usearch (a graph over 8-bit vectors) and LanceDB (cells with codes, in a table).

Neither is a dependency of the project: `pip install usearch lancedb` beside it, or the rows are left out with a line.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from vector_search.data import EXACT_ROWS, Data
from vector_search.measure import Search, bytes_below
from vector_search.systems import Opened, Setting, Sizes, num_cells

LINKS, BUILD_EFFORT = 16, 64


class Usearch:
    """One graph over all vectors, 8 bits a number, 16 links a node."""

    name = built = "usearch"
    settings = tuple(
        Setting(label=f"i8 graph, effort {effort}", options={"effort": effort}) for effort in (64, 128, 256)
    )

    def missing(self) -> str | None:
        """Whether it is installed."""
        return _absent("usearch")

    def build(self, data: Data, folder: Path) -> None:
        """Add all vectors."""
        graph = self._graph(data.dim)
        for start, block in data.blocks():
            graph.add(np.arange(start, start + len(block)), block, threads=_threads())
        graph.save(str(folder / "graph.usearch"))

    def open(self, data: Data, folder: Path) -> Opened:
        """The graph in memory."""
        graph = self._graph(data.dim)
        graph.load(str(folder / "graph.usearch"))

        def searching(setting: Setting) -> Search:
            def search(queries: Float32[np.ndarray, "queries dim"], k: int) -> Int[np.ndarray, "queries k"]:
                graph.expansion_search = setting.options["effort"]
                keys = graph.search(queries, k, threads=_threads()).keys
                return np.asarray(keys).astype(np.int64).reshape(len(queries), -1)

            return search

        return Opened(search=searching)

    def sizes(self, data: Data, folder: Path) -> Sizes:
        """Of the one file, which holds the 8-bit vectors too."""
        size = bytes_below(folder)
        return Sizes(index=size, fixed=0, disk=size)

    def _graph(self, dim: int) -> Any:
        from usearch.index import Index

        return Index(ndim=dim, metric="cos", dtype="i8", connectivity=LINKS, expansion_add=BUILD_EFFORT)


class Lance:
    """A LanceDB table with an index over cells; the best of the codes are compared again with the table's vectors."""

    def __init__(self, name: str, kind: str, codes: Mapping[str, int]) -> None:
        self.name = self.built = name
        self._kind, self._codes = kind, codes
        self.settings = tuple(
            Setting(
                label=f"{kind}, {probes} probes, {refine}K compared again", options={"probes": probes, "refine": refine}
            )
            for probes, refine in ((20, 10), (128, 20))
        )

    def missing(self) -> str | None:
        """Whether it is installed."""
        return _absent("lancedb")

    def build(self, data: Data, folder: Path) -> None:
        """The table, then its index."""
        import lancedb

        table = lancedb.connect(str(folder)).create_table("images", _batches(data), schema=_schema(data.dim))
        table.create_index(
            metric="cosine",
            vector_column_name="vector",
            index_type=self._kind,
            num_partitions=num_cells(data.size),
            **self._codes,
        )

    def open(self, data: Data, folder: Path) -> Opened:
        """The table; queries are asked one at a time, as its Python interface does."""
        import lancedb

        table = lancedb.connect(str(folder)).open_table("images")

        def one(query: Float32[np.ndarray, "dim"], k: int, options: Mapping[str, int]) -> Int[np.ndarray, "found"]:
            asked = table.search(query, vector_column_name="vector").distance_type("cosine").limit(k)
            asked = asked.nprobes(options["probes"]).refine_factor(options["refine"]).select(["row"])
            return np.resize(np.append(asked.to_arrow()["row"].to_numpy(), [-1] * k), k)

        return Opened(
            search=lambda setting: lambda queries, k: np.stack([one(query, k, setting.options) for query in queries])
        )

    def sizes(self, data: Data, folder: Path) -> Sizes:
        """The index's files alone, and all of the table's with its float32 vectors."""
        index = sum(bytes_below(path) for path in folder.rglob("_indices"))
        return Sizes(index=index, fixed=0, disk=bytes_below(folder))


def _schema(dim: int) -> Any:
    import pyarrow

    return pyarrow.schema([("row", pyarrow.int64()), ("vector", pyarrow.list_(pyarrow.float32(), dim))])


def _batches(data: Data) -> Iterator[Any]:
    import pyarrow

    for start, block in data.blocks(EXACT_ROWS // 4):
        numbers = pyarrow.array(np.arange(start, start + len(block)))
        vectors = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(block.ravel()), data.dim)
        yield pyarrow.record_batch([numbers, vectors], schema=_schema(data.dim))


def _threads() -> int:
    return int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))


def _absent(module: str) -> str | None:
    try:
        import_module(module)
    except ImportError:
        return f"not installed: pip install {module}"
    return None
