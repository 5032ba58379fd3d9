"""A Milvus server for tests: milvus-lite behind it, float16 vectors and answers in bytes in front, as a cluster speaks."""

from __future__ import annotations

from typing import Any

import numpy as np

from knn_diffusion.retrieval.milvus.connection import Connection


class ServerConnection(Connection):
    """Refuses what a server would refuse, remembers what it was asked, and lets milvus-lite do the work."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.lite = False
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def call(self, what: str, **arguments: Any) -> Any:
        if what == "get_server_version":
            return super().call(what, **arguments)
        self.asked.append((what, arguments))
        return getattr(self, f"_{what}", self._pass_on)(what, **arguments)

    def arguments(self, what: str) -> dict[str, Any]:
        """What the latest call of that name was given."""
        return next(given for name, given in reversed(self.asked) if name == what)

    def _pass_on(self, what: str, **arguments: Any) -> Any:
        return super().call(what, **arguments)

    def _create_collection(self, what: str, **arguments: Any) -> Any:
        from pymilvus import DataType

        fields = {field.name: field for field in arguments["schema"].fields}
        assert fields["embedding"].dtype == DataType.FLOAT16_VECTOR
        fields["embedding"]._dtype = DataType.FLOAT_VECTOR  # milvus-lite has no float16
        return super().call(what, **arguments)

    def _upsert(self, what: str, data: list[dict[str, Any]], **arguments: Any) -> Any:
        assert all(row["embedding"].dtype == np.float16 for row in data)
        wide = [row | {"embedding": row["embedding"].astype(np.float32).tolist()} for row in data]
        return super().call(what, data=wide, **arguments)

    def _search(self, what: str, data: list[np.ndarray], **arguments: Any) -> Any:
        assert all(one.dtype == np.float16 for one in data)
        answers = super().call(what, data=[one.astype(np.float32) for one in data], **arguments)
        return [[{"id": hit["id"], "entity": _in_bytes(hit["entity"])} for hit in hits] for hits in answers]

    def _flush(self, what: str, **arguments: Any) -> Any:
        raise AssertionError("a server flushes by itself, and allows clients few flushes")


def _in_bytes(entity: dict[str, Any]) -> dict[str, Any]:
    return entity | {"embedding": np.array(entity["embedding"], np.float16).tobytes()}
