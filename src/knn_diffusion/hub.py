"""Folders on the Hugging Face hub, called `owner/name`: fetched into the cache that all its libraries share, or sent there.

What the cache holds is used as it is, without a word to the network. Of a repository only the files that a caller lists
are fetched, so that nobody's code or pickle gets here; whoever reads them verifies them.
"""

from __future__ import annotations

import errno
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from knn_diffusion.errors import HubError, KnnDiffusionError, MissingDependencyError, UsageError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
LOG_IN = "log in with `hf auth login`"

OWN_FOLDERS = ("model", "index", "encoder", "tokenizer", "denoiser", "judge", "tokens", "checkpoints")
"""Names that this package gives to folders inside those of its users."""
PART_ENDINGS = (".json", ".safetensors", ".txt", ".model", "NOTICE")

logger = logging.getLogger(__name__)


def is_hub_id(name: str | Path) -> bool:
    """Whether this is `owner/name`, and neither a path here nor one in a folder that is here: those are never looked for.

    Nor is what ends as our own folders do: `my-run/model` is a path, asked for in the wrong folder.
    """
    fits = isinstance(name, str) and HUB_ID.fullmatch(name) is not None
    return fits and str(name).partition("/")[2] not in OWN_FOLDERS and not Path(name).parent.exists()


def part_files(part: str) -> list[str]:
    """Patterns of what a part of a model is made of; a star stands for folders too."""
    return [f"{part}/*{ending}" for ending in PART_ENDINGS]


def fetch(
    repository: str,
    files: Sequence[str],
    *,
    needs: str | Sequence[str],
    revision: str | None = None,
    network: bool = True,
) -> Path:
    """The folder of a repository in the cache, downloaded where it is not there yet; a line says so.

    Args:
        files: patterns of what is downloaded.
        needs: a file without which the folder is not what the caller looks for, or several of which one suffices.
        revision: branch, tag or commit; None is the main branch, as it was when the cache got it.
        network: whether it may be downloaded.

    Raises: HubError when it is not there, may not be read or cannot be reached; KnnDiffusionError when the disk is full;
        MissingDependencyError without huggingface_hub.
    """
    hub = _library(repository)
    asked = {"revision": revision, "allow_patterns": list(files)}
    with _translated_errors(hub, repository, revision):
        try:
            folder = Path(hub.snapshot_download(repository, local_files_only=True, **asked))
        except hub.errors.LocalEntryNotFoundError:
            folder = None
    wanted = [needs] if isinstance(needs, str) else needs
    if folder is not None and any((folder / name).is_file() for name in wanted):
        return folder
    if not network:
        raise HubError(
            f"expected {repository} in the hub's cache, found it not there and have no leave to download it: "
            f"run `hf download {repository}`"
        )
    logger.warning("downloading %s%s from %s", repository, f" ({revision})" if revision else "", hub.constants.ENDPOINT)
    with _translated_errors(hub, repository, revision):
        folder = Path(hub.snapshot_download(repository, **asked))
    if not any((folder / name).is_file() for name in wanted):
        raise HubError(
            f"expected {' or '.join(wanted)} in {repository}, the repository has none: choose another repository"
        )
    return folder


def send(
    folder: Path, repository: str, files: Sequence[str], *, private: bool = False, revision: str | None = None
) -> str:
    """Send a folder's files, making the repository where there is none; older files of these patterns are deleted there.

    Args:
        private: whether a new repository is seen by its owner only.
        revision: an existing branch; None is the main one.

    Returns: where the new state can be seen.
    Raises: UsageError for a name that is not `owner/name`; else as `fetch`.
    """
    check_hub_id(repository)
    hub = _library(repository)
    with _translated_errors(hub, repository, revision):
        api = hub.HfApi()
        api.create_repo(repository, private=private or None, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            revision=revision,
            allow_patterns=list(files),
            delete_patterns=list(files),
            commit_message="Upload a KNN-Diffusion model",
        )
    return str(commit.commit_url)


def check_hub_id(name: str) -> None:
    """Raise UsageError when a name is not of the form `owner/name`."""
    if HUB_ID.fullmatch(name) is None:
        raise UsageError(f"expected owner/name of a repository on the hub, got {name!r}: write it like me/my-model")


def _library(repository: str) -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError:
        raise MissingDependencyError(
            f"expected huggingface_hub for {repository}, which is no folder here and may be on the hub, it is not installed: "
            "check the path, or pip install 'knn-diffusion[hub]'"
        ) from None
    return huggingface_hub


@contextmanager
def _translated_errors(hub: Any, repository: str, revision: str | None) -> Iterator[None]:
    """One line for whatever went wrong; anything may come out of the HTTP library and the storage behind the hub."""
    try:
        yield
    except Exception as error:
        raise _described(hub, error, repository, revision) from None


def _described(hub: Any, error: Exception, repository: str, revision: str | None) -> KnnDiffusionError:
    errors, page = hub.errors, f"{hub.constants.ENDPOINT}/{repository}"
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # why the hub was given up for the cache
    status = getattr(getattr(error, "response", None), "status_code", None)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return KnnDiffusionError(f"the disk is full, {repository} is not whole: free space and ask again, it goes on")
    if isinstance(error, errors.HFValidationError):
        return UsageError(f"expected owner/name of a repository on the hub, got {repository!r}: check the name")
    if isinstance(error, errors.GatedRepoError):
        return HubError(f"{repository} is gated: accept its terms on {page}, then {LOG_IN}")
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"expected the revision {revision} of {repository}, there is none: see {page}/commits/main")
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"expected the repository {repository} on the hub, there is none that you may see, and no such folder here: "
            f"check the name, or {LOG_IN}"
        )
    if status in (401, 403):
        return HubError(
            f"the hub refused {repository} ({status}): {LOG_IN}, with a token that may read (to push: write) there"
        )
    if hub.is_offline_mode():
        return HubError(
            f"expected {repository} in the hub's cache, found it not whole, and HF_HUB_OFFLINE forbids to download it: "
            "unset that, or copy the cache from a machine with a network"
        )
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return HubError(f"{repository} could not be reached on the hub ({reason}): check the network and ask again")
