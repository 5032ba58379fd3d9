"""One connection to a Milvus server or to a milvus-lite file: every call has a time limit, every failure is one line of ours."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from knn_diffusion.errors import MissingDependencyError, StoreError, UsageError

INSTALL = "pip install knn-diffusion[milvus]"
LITE = ".db"
"""Ending of a path that milvus-lite serves inside this process."""
_SCHEMES = ("http://", "https://", "tcp://", "unix:")


class Connection:
    """A client of pymilvus whose errors are StoreErrors.

    Args:
        uri: `http://host:19530`, or a file ending in .db for milvus-lite.
        token: `user:password` or an API key.
        timeout_seconds: for connecting and for every call.

    Raises: UsageError for what is no address; StoreError when nothing answers there in time; MissingDependencyError
        without pymilvus.
    """

    def __init__(self, uri: str, token: str | None = None, timeout_seconds: float = 10.0) -> None:
        self.uri, self._timeout = without_password(uri), timeout_seconds
        _check_address(uri)
        client, self._errors = _pymilvus(uri)
        try:
            self._client = client(uri=uri, token=token or "", timeout=timeout_seconds)
        except self._errors as error:
            raise StoreError(self._unreachable(error)) from None
        self.lite = str(self.call("get_server_version")).startswith("milvus_lite")

    def call(self, what: str, **arguments: Any) -> Any:
        """What the client's method of that name answers."""
        try:
            return getattr(self._client, what)(timeout=self._timeout, **arguments)
        except self._errors as error:
            raise StoreError(f"Milvus at {self.uri} failed to {what.replace('_', ' ')} ({_first_line(error)}): "
                             "check that the server runs and that the token may do this, then try again") from None  # fmt: skip

    def close(self) -> None:
        """Let go of the connection; milvus-lite keeps its file until the process ends."""
        self._client.close()

    def _unreachable(self, error: Exception) -> str:
        if self.uri.endswith(LITE):
            return (
                f"{self.uri} cannot be opened by milvus-lite ({_first_line(error)}): close the process that has it open, "
                "or choose another file"
            )
        return (
            f"no Milvus answers at {self.uri} ({_first_line(error)}): check the address and the token, and that the "
            "server runs"
        )


def without_password(uri: str) -> str:
    """The address as it may be shown."""
    return re.sub(r"//[^/@]*@", "//", uri)


def _check_address(uri: str) -> None:
    local = uri.endswith(LITE) and "://" not in uri
    if not local and not uri.startswith(_SCHEMES):
        raise UsageError(
            f"expected http://host:port of a Milvus server or a file ending in {LITE}, got {without_password(uri)!r}: mend the address"
        )
    if local and not Path(uri).parent.is_dir():
        raise UsageError(f"expected a file in an existing folder, got {uri!r}: create {Path(uri).parent} first")


def _pymilvus(uri: str) -> tuple[Any, tuple[type[Exception], ...]]:
    """The client's class and all that it raises."""
    try:
        import grpc
        from pymilvus import MilvusClient
        from pymilvus.exceptions import MilvusException

        if uri.endswith(LITE):
            import milvus_lite  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"expected {error.name} to search in Milvus, it is missing: {INSTALL}") from None
    for name in ("pymilvus", "milvus_lite"):  # they print the traceback of what they raise, too
        logger = logging.getLogger(name)
        if logger.level in (logging.NOTSET, logging.WARNING):
            logger.setLevel(logging.CRITICAL)
    return MilvusClient, (MilvusException, grpc.RpcError, grpc.FutureTimeoutError)


def _first_line(error: Exception) -> str:
    said = str(getattr(error, "message", "") or error).strip()
    return said.splitlines()[0][:160] if said else type(error).__name__
