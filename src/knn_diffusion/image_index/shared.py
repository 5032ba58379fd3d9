"""Where an index is: a folder, a name inside the package, or `owner/name` of the hub, from whose cache it opens and is never changed.

On the hub it lies in `index/` of a repository, beside the `encoder/` that made it, as in a model's; or the repository is an index.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from knn_diffusion.hub import fetch, is_hub_id, part_files
from knn_diffusion.retrieval.identity import DATABASE

BUNDLES = Path(__file__).parent.parent / "bundles"
FOLDER = "index"
INDEX_FILES = (DATABASE, "segments/*.npy")


@dataclass(frozen=True, slots=True)
class Place:
    """The folder of an index, and the repository of the hub that it is a copy of."""

    folder: Path
    repository: str | None = None

    def fetch_encoder(self) -> None:
        """Download the encoder that lies beside the index on the hub, if there is one and the cache has it not."""
        if self.repository is not None and self.folder.name == FOLDER:
            commit = self.folder.parent.name  # of that state of the repository which the index is of
            fetch(self.repository, part_files("encoder"), needs=f"{FOLDER}/{DATABASE}", revision=commit)


def find_index(name_or_folder: str | Path) -> Place:
    """Where an index is; one of the hub is downloaded where it must be.

    Raises: HubError when the hub has none of that name or cannot be reached; MissingDependencyError without huggingface_hub.
    """
    if is_hub_id(name_or_folder):
        names = [f"{FOLDER}/{name}" for name in INDEX_FILES]
        copy = fetch(str(name_or_folder), [*names, *INDEX_FILES], needs=(f"{FOLDER}/{DATABASE}", DATABASE))
        inside = (copy / FOLDER / DATABASE).is_file()
        return Place(copy / FOLDER if inside else copy, str(name_or_folder))
    path, bundled = Path(name_or_folder), BUNDLES / str(name_or_folder) / FOLDER
    return Place(bundled if not (path / DATABASE).is_file() and (bundled / DATABASE).is_file() else path)
