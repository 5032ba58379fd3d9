"""A Hugging Face hub on this machine: folders served as the real one serves repositories, and a cache of its own.

The library's own client talks to it over the loopback; what is sent is taken by `Uploads` in the place of `HfApi`'s methods.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
from huggingface_hub import HfApi
from huggingface_hub import constants as hub_constants
from huggingface_hub.utils import filter_repo_objects

Answer = tuple[int, dict[str, str], bytes]


@dataclass
class TinyHub:
    """Repositories by `owner/name`, each a folder with all its files."""

    place: Path
    gated: set[str] = field(default_factory=set)
    private: dict[str, bool] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    """Paths of all requests, in order."""
    status: int = 200
    """Any other is the answer to everything."""
    commits: set[str] = field(default_factory=set)
    """Of all states that were asked about; files are those of now, whichever is asked for."""

    def folder(self, repository: str) -> Path:
        return self.place / repository

    def answer(self, path: str) -> Answer:
        self.asked.append(path)
        words = path.partition("?")[0].strip("/").split("/")
        api = words[:2] == ["api", "models"]
        repository, rest = "/".join(words[2:4] if api else words[:2]), words[4:] if api else words[2:]
        if self.status != 200:
            return self.status, {}, b"{}"
        if not self.folder(repository).is_dir():
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        tree = json.dumps(self._tree(repository)).encode()
        commit = rest[1] if rest[1] in self.commits else hashlib.sha1(tree).hexdigest()
        self.commits.add(commit)
        if rest[1] not in ("main", "v1", commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if rest[0] == "revision":
            return 200, {}, json.dumps({"id": repository, "sha": commit, "siblings": []}).encode()
        if rest[0] == "tree":
            return 200, {}, tree
        if repository in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        content = self.folder(repository).joinpath(*rest[2:]).read_bytes()
        return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}, content

    def fetched(self) -> set[str]:
        """The files that were read, without their repositories."""
        return {path.split("/", 5)[5] for path in self.asked if "/resolve/" in path}

    def _tree(self, repository: str) -> list[dict[str, Any]]:
        root = self.folder(repository)
        return [
            {
                "type": "file",
                "path": path.relative_to(root).as_posix(),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in sorted(root.rglob("*"))
            if path.is_file()
        ]


class Uploads:
    """What `HfApi` does for an upload, straight into the folders of a tiny hub."""

    def __init__(self, hub: TinyHub) -> None:
        self.hub = hub

    def create_repo(self, _: HfApi, repo_id: str, *, private: bool | None, exist_ok: bool) -> None:
        assert exist_ok
        self.hub.private.setdefault(repo_id, bool(private))
        self.hub.folder(repo_id).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, _: HfApi, **asked: Any) -> Any:
        there, folder = self.hub.folder(asked["repo_id"]), Path(asked["folder_path"])
        for name in filter_repo_objects(_names(there), allow_patterns=asked["delete_patterns"]):
            (there / name).unlink()
        for name in filter_repo_objects(_names(folder), allow_patterns=asked["allow_patterns"]):
            (there / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, there / name)
        return SimpleNamespace(commit_url=f"https://hub.test/{asked['repo_id']}/commit/{asked['revision'] or 'main'}")


def _names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


@contextmanager
def serving(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TinyHub]:
    """A hub that the library finds in the place of the real one, with an empty cache in `place`."""
    hub = TinyHub(place / "hub")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, content = hub.answer(self.path)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    point_at(f"http://127.0.0.1:{server.server_port}", place / "cache", monkeypatch)
    for name in ("create_repo", "upload_folder"):  # a call that the real one does not understand is an error
        fake = create_autospec(getattr(HfApi, name), side_effect=getattr(Uploads(hub), name))
        monkeypatch.setattr(HfApi, name, fake)
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def point_at(endpoint: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library look at that address, keep what it gets in that folder, and know no token."""

    monkeypatch.setattr(hub_constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(hub_constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
