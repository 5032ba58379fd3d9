"""Images to retrieve from: an encoder, a store and a search, in one object.

    index = ImageIndex.build(["photos"], "my-index", encoder="stickers")
    index.search_text("a red heart", k=5).ids
    index.add(["new/*.png"])

The folder is the truth (`retrieval/store.py`); everything else here is made from it when it is opened.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float16, Int
from PIL import Image

from knn_diffusion import images as pictures
from knn_diffusion.checkpoint import atomic_folder
from knn_diffusion.config import from_dict, to_dict
from knn_diffusion.errors import FingerprintError, ImageError, StoreError, UsageError
from knn_diffusion.image_index.dedup import DedupReport
from knn_diffusion.image_index.distributed import RayConfig, embed_on_ray
from knn_diffusion.image_index.exchange import Claim, refuse_unknown, store_for
from knn_diffusion.image_index.ingest import AddReport, Images, Writer, embed, find_sources
from knn_diffusion.image_index.upkeep import Upkeep
from knn_diffusion.models.encoders import JointEncoder, load_encoder
from knn_diffusion.retrieval.compaction import Waste
from knn_diffusion.retrieval.database import DATABASE
from knn_diffusion.retrieval.dedup import OFF, DedupConfig, calibrate, default_rule
from knn_diffusion.retrieval.drift import Drift, drift
from knn_diffusion.retrieval.index import LocalRetriever
from knn_diffusion.retrieval.interchange import (
    ExportReport,
    ImportReport,
    Layout,
    Sources,
    export_vectors,
    find_vectors,
    import_vectors,
)
from knn_diffusion.retrieval.kept import cache_problem
from knn_diffusion.retrieval.near_duplicates import NearDuplicateRule, find_near_duplicates
from knn_diffusion.retrieval.neighbors import Progress, neighbors_of, self_neighbors
from knn_diffusion.retrieval.plan import IndexConfig, Modality, Plan, plan_for
from knn_diffusion.retrieval.segments import Snapshot, unit_rows
from knn_diffusion.retrieval.store import EncoderIdentity, Store
from knn_diffusion.shapes import Neighbors

BUNDLES = Path(__file__).parent.parent / "bundles"
BUILDING = "building"
"""The setting that says that a build is not complete."""
Excluded = Collection[str] | Sequence[Collection[str]]


class ImageIndex:
    """A folder of images that can be searched by text, by image and by vector.

    Reads may come from any number of threads. An index that is read-only (inside the package, or without write
    permission) takes `add` and `remove` in memory only; `save` keeps them elsewhere.
    """

    def __init__(
        self, store: Store, encoder: JointEncoder | str | Path | None = None, settings: IndexConfig | None = None
    ) -> None:
        self._store = store
        self._encoder: JointEncoder | None = None
        self._encoder_place = encoder if isinstance(encoder, str | Path) else None
        self._lock = threading.Lock()
        self.report: AddReport | None = None
        """What `build` did with its images."""
        self.import_report: ImportReport | None = None
        """What `import_embeddings` did with its vectors."""
        self.upkeep: Upkeep | None = None
        """What compacts the index in the background, see `keep_compact`."""
        self._retriever = LocalRetriever(store, settings or self._stored_settings(), self._stored_rule())
        if encoder is not None and not isinstance(encoder, str | Path):
            self._encoder = self._checked(encoder)

    @classmethod
    def build(
        cls,
        images: Images,
        path: str | Path | None,
        encoder: JointEncoder | str | Path,
        *,
        progress: Progress | None = None,
        announce: Callable[[Plan], None] | None = None,
        previews: bool = True,
        settings: IndexConfig | None = None,
        rule: DedupConfig | None = None,
        ray: RayConfig | None = None,
    ) -> ImageIndex:
        """A new index of the images in a new folder, or in memory when `path` is None; `report` says what was skipped.

        Args:
            images: folders, files, wildcards, tar shards, parquet tables, or pictures.
            encoder: a joint encoder, or the name or folder of one.
            announce: told how so many images will be searched and what that takes, before the work begins.
            previews: keep a picture of at most 64 pixels of each image, to show neighbors by.
            rule: when two images count as the same; None takes the encoder's, or calibrates one on these images.
            ray: spread the work over processes or machines. The index is the same, and an interrupted build goes on
                with the same call.

        Raises: UsageError when the folder exists or no image is found; ImageError when none can be used; with `ray`, what
            `add` raises, and FingerprintError when another encoder began the build. After an interruption the folder holds
            what was added so far, and `add` goes on from there.
        """
        found, loaded = find_sources(images), _loaded(encoder)
        if announce is not None:
            announce(plan_for(len(found), loaded.dim, settings or IndexConfig()))
        identity = EncoderIdentity(name=loaded.name, fingerprint=loaded.fingerprint, dim=loaded.dim)
        store = _interrupted(path) if ray is not None else None
        if store is None:
            store = Store.create(Path(path) if path is not None else None, identity)
            store.set_setting(BUILDING, "yes")
        index = cls._opened(store, loaded, settings)
        if rule is not None:
            index.set_rule(rule)
        if isinstance(encoder, str | Path):
            place = str(Path(encoder).absolute()) if Path(encoder).is_dir() else str(encoder)
            store.set_setting("encoder_place", place)
        try:
            report = index.report = index.add(found, progress=progress, previews=previews, ray=ray)
        finally:
            if empty := not len(index):
                index._abandon()
        if empty:
            first = report.skipped[0]
            raise ImageError(
                f"none of {len(found)} images could be used (first: {first.source}: {first.reason}): mend or replace them"
            )
        index._retriever.prepare(progress)
        return index

    @classmethod
    def import_embeddings(
        cls,
        source: Sources,
        path: str | Path,
        encoder: JointEncoder | str | Path | None = None,
        *,
        encoder_name: str | None = None,
        dim: int | None = None,
        ids: str | Path | None = None,
        provenance: str | Path | None = None,
        progress: Progress | None = None,
        settings: IndexConfig | None = None,
    ) -> ImageIndex:
        """An index of embeddings that were computed elsewhere; `import_report` says what was skipped.

        After an interruption the same call goes on where it stopped. Into an index that is there already, of the same
        encoder, the vectors are added; those in it are passed over.

        Args:
            source: a folder as clip-retrieval or `export` writes it, or .npy files.
            encoder: the joint encoder that made them, or its name or folder; not needed for a folder of `export`.
            encoder_name, dim: name and width of an encoder that is not at hand. Then texts and images cannot be searched
                for, vectors can, until the same files are imported again with the encoder and this name.
            ids: a .txt file with an id a line, or a .npy file of strings or whole numbers.
            provenance: a .parquet or .jsonl table of all vectors, with columns such as url, image_path, key.

        Raises: UsageError when there is nothing to import or nobody says which encoder it was; FingerprintError when the
            vectors are of another; StoreError when a file is damaged, or no vector can be used.
        """
        files, new = find_vectors(source, ids=ids, provenance=provenance), not (Path(path) / DATABASE).is_file()
        store = store_for(files, Path(path), Claim(encoder=encoder, name=encoder_name, dim=dim))
        index = cls(store, encoder, settings)
        try:
            report = index.import_report = import_vectors(store, files, progress=progress)
        finally:
            if new and not len(index):
                index._abandon()
        if not report.added and not report.already_present and not report.resumed_at:
            first = f" (first: {report.skipped[0].source}: {report.skipped[0].reason})" if report.skipped else ""
            raise StoreError(
                f"none of {report.rows} vectors in {files.shards[0].path} could be used{first}: save others"
            )
        if store.setting("dedup") is None:
            index.set_rule(default_rule(store.encoder.name) or calibrate(store))
        index._retriever.prepare(progress)
        return index

    def export(
        self,
        path: str | Path,
        *,
        layout: Layout = "clip-retrieval",
        faiss: bool = False,
        progress: Progress | None = None,
    ) -> ExportReport:
        """Write ids, provenance and embeddings into a new folder that other tools read.

        Args:
            layout: "clip-retrieval" (img_emb/*.npy and metadata/*.parquet) or "npy" (embeddings.npy, ids.txt and
                provenance.jsonl).
            faiss: also write `image.index` for faiss.

        Raises: UsageError when the folder exists; StoreError when the index is empty; KnnDiffusionError when the disk is
            full, and then nothing is left.
        """
        settings = self._retriever.settings if faiss else None
        return export_vectors(self._store, Path(path), layout=layout, faiss=settings, progress=progress)

    @classmethod
    def open(
        cls,
        path: str | Path,
        encoder: JointEncoder | str | Path | None = None,
        *,
        read_only: bool = False,
        settings: IndexConfig | None = None,
    ) -> ImageIndex:
        """The index in a folder, or the bundled one of that name.

        Args:
            encoder: the one the index was built with; None loads it when first needed.

        Raises: StoreError when there is no sound index; FingerprintError when it was built with another encoder.
        """
        return cls._opened(Store.open(_resolve(path), read_only=read_only), encoder, settings)

    # Changing

    def add(
        self,
        images: Images,
        *,
        progress: Progress | None = None,
        previews: bool = True,
        ray: RayConfig | None = None,
    ) -> AddReport:
        """Add images; each batch is on the disk, and found by searches, when the next one starts.

        An image that cannot be read is listed with its reason and passed over; one that is there already, pixel for
        pixel, is counted and passed over. A build that was interrupted is complete when this returns.

        Args:
            ray: spread decoding and embedding over processes or machines. An image under a known absolute path, in a file
                that has not changed since, is then passed over unread.

        Raises: UsageError when no image is found; KnnDiffusionError when the disk is full, or Ray gives up: earlier
            batches stay. MissingDependencyError without Ray.
        """
        found, writer = find_sources(images), Writer(self._store)
        told = progress or (lambda what, done, total: None)
        told("adding images", 0, len(found))
        if ray is None:
            outcomes = embed(found, self.encoder, previews, writer.knows)
        else:
            outcomes = embed_on_ray(found, self.encoder, self._store, previews, ray)
        with closing(outcomes):
            try:
                for number, outcome in enumerate(outcomes, 1):
                    writer.take(outcome)
                    told("adding images", number, len(found))
            finally:
                writer.commit()
        self._complete()
        self._look_after()
        return writer.report

    def remove(self, ids: Sequence[str]) -> None:
        """Remove images; the next search does not find them.

        Raises: UsageError naming an unknown id, before anything is removed.
        """
        self._store.remove(ids)
        self._look_after()

    def dedup(
        self,
        *,
        threshold: float | None = None,
        manhattan: float | None = None,
        device: str = "cpu",
        progress: Progress | None = None,
    ) -> DedupReport:
        """Find the images that repeat an earlier one which stays; the report's `remove` takes them out of the index.

        Args:
            threshold: least cosine of a copy; None: half as far from 1 as that of neighbor lists, and at least 0.95.
            manhattan: most that its 8×8 picture may differ, in levels of 0 … 255, where both have one; None: as in neighbor
                lists. 255 believes the embeddings alone.

        Raises: ConfigError for a threshold outside (0, 1]; StoreError when the index is damaged.
        """
        asked = {"threshold": threshold, "manhattan": manhattan}
        rule = replace(NearDuplicateRule.stricter_than(self.rule), **{k: v for k, v in asked.items() if v is not None})

        def read(now: Snapshot) -> DedupReport:
            found = find_near_duplicates(self._store, now, rule, device=device, progress=progress)
            return DedupReport(store=self._store, snapshot=now, rule=rule, found=found, removed=self._look_after)

        return self._store.consistently(read)

    def compact(self, *, progress: Progress | None = None) -> Waste:
        """Take removed images off the disk and make many small segments few; ids, order and everything else stay.

        Searches, additions and removals go on meanwhile. Whether it is worth it, `waste()` tells.

        Raises: StoreError for a read-only or damaged index; KnnDiffusionError when the disk is full. It is as it was then.
        """
        return self._store.compact(progress)

    def keep_compact(self) -> Upkeep:
        """From now on compact in a thread whenever `add` or `remove` leaves so much waste that it is worth it.

        What stopped one, such as a full disk, is said by the `problem` of what is returned.

        Raises: StoreError when the index is read-only.
        """
        self._require_writable()
        self.upkeep = self.upkeep or Upkeep(self._store)
        self._look_after()
        return self.upkeep

    def waste(self) -> Waste:
        """What share of the images on the disk is removed, and what `compact` would free."""
        return self._store.waste()

    def retrain(self, *, progress: Progress | None = None) -> Plan:
        """Train the cells and codes of a large index anew, on the images there are now; `drift` says when it is worth it.

        Searches go on in the old ones, in every process, until the new ones are complete; then all of them change over. What
        was interrupted goes on with the next call.

        Raises: UsageError where every image is compared; StoreError when the index is read-only; KnnDiffusionError when the
            disk is full, and then it is searched as before.
        """
        self._require_writable()
        return self._retriever.retrain(progress)

    def drift(self) -> Drift | None:
        """How well cells and codes fit the images that came after their training; without a search, in about a second.

        None where every image is compared, and where no later images are.
        """
        return drift(self._retriever)

    def set_rule(self, rule: DedupConfig) -> None:
        """Keep with the index when two of its images count as the same picture."""
        self._store.set_setting("dedup", json.dumps(to_dict(rule)))
        self._retriever.rule = rule

    def set_reach(self, settings: IndexConfig) -> None:
        """Keep with the index how far queries look, as `tune` found it; its other settings stay those of each opening.

        Raises: StoreError when the index is read-only.
        """
        self._require_writable()
        reaches = {"image": to_dict(settings.image), "text": to_dict(settings.text)}
        self._store.set_setting("reach", json.dumps(reaches))
        self._retriever.settings = settings

    def save(self, path: str | Path, *, sealed: bool = False) -> None:
        """Write the index as it is now, additions in memory included, into a new folder.

        Args:
            sealed: the copy opens read-only and its folder never changes, as inside a package.

        Raises: UsageError when the folder exists; KnnDiffusionError when the disk is full, and then nothing is left.
        """
        target = Path(path)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UsageError(f"expected a new folder for the index, {target} exists: choose another")
        with atomic_folder(target) as temporary:
            self._store.copy_to(temporary, sealed=sealed)

    def overlay(self) -> ImageIndex:
        """The images of this index's folder in one that changes in memory only; this one stays as it is.

        Raises: StoreError for an index that was never in a folder.
        """
        if self._store.folder is None:
            raise StoreError("expected an index in a folder to lay changes over, this one is in memory: save it first")
        return ImageIndex.open(self._store.folder, self._encoder or self._encoder_place, read_only=True)

    def close(self) -> None:
        """Leave no journal beside the database, after a compaction under way; the index cannot be used afterwards."""
        if self.upkeep is not None:
            self.upkeep.wait()
        self._store.close()

    def __enter__(self) -> ImageIndex:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Searching

    def search(
        self,
        queries: Float[np.ndarray, "queries dim"],
        k: int,
        exclude_ids: Excluded | None = None,
        where: str | None = None,
        *,
        modality: Modality = "image",
        deduplicate: bool = True,
    ) -> Neighbors:
        """The k nearest images of each vector, best first, copies of a better one left out.

        Args:
            exclude_ids: ids no query may find, or for each query the ids it may not find.
            where: an SQL condition over id, source, key and added_at, such as `source LIKE '%fruit%'`.
            modality: what the vectors are embeddings of; among very many images texts must look further.

        Raises: UsageError when k is below 1 or beyond the index, or `where` is no condition; FingerprintError when the
            vectors have another width.
        """
        excluded = _per_query(exclude_ids, len(queries))
        rule = None if deduplicate else OFF
        return self._retriever.search(queries, k, excluded, where, modality=modality, rule=rule)

    def search_text(self, text: str | Sequence[str], k: int, **options: Any) -> Neighbors:
        """The k images nearest to each text; options as in `search`."""
        queries = self.encoder.encode_texts([text] if isinstance(text, str) else list(text))
        return self.search(queries, k, modality="text", **options)

    def search_image(self, image: str | Path | Image.Image, k: int, **options: Any) -> Neighbors:
        """The k images nearest to an image, the image itself first if it is in the index; options as in `search`."""
        return self.search(self.encoder.encode_images([pictures.open_image(image)]), k, **options)

    def neighbor_rows(
        self,
        queries: Float[np.ndarray, "queries dim"],
        k: int,
        exclude_ids: Excluded | None = None,
        *,
        device: str = "cpu",
    ) -> Int[np.ndarray, "queries k"]:
        """For training: rows of `embeddings` nearest to each image, -1 where too few are left; near-copies left out.

        Args:
            exclude_ids: as in `search`; the first of a query is the image itself.
        """
        snapshot = self._store.snapshot()
        rows, excluded = snapshot.live_rows, _per_query(exclude_ids, len(queries)) or [[]] * len(queries)
        found = self._store.rows_of([one for ids in excluded for one in ids], snapshot)
        places = np.where(found >= 0, np.searchsorted(rows, found), -1)
        table = np.full((len(queries), max((len(ids) for ids in excluded), default=0)), -1, np.int64)
        table[np.arange(table.shape[1]) < np.array([len(ids) for ids in excluded], np.int64)[:, None]] = places
        units = unit_rows(queries, self.dim, "queries")
        return neighbors_of(self._store, units, table, k, self.rule, device=device)

    def self_neighbors(
        self, k: int, *, output: str | Path | None = None, device: str = "cpu", progress: Progress | None = None
    ) -> Int[np.ndarray, "items k"]:
        """For training: the rows of `embeddings` nearest to each of them, itself and its near-copies left out.

        Args:
            output: a .npy file for the table, which then is mapped, not held; an interrupted call goes on there.
        """
        place = Path(output) if output is not None else None
        return self_neighbors(self._store, k, self.rule, device=device, output=place, progress=progress)

    # Facts

    def __len__(self) -> int:
        return len(self._store)

    def __contains__(self, id_: object) -> bool:
        return isinstance(id_, str) and bool(self._store.rows_of([id_])[0] >= 0)

    @property
    def encoder(self) -> JointEncoder:
        """The joint encoder of the index, loaded when first asked for.

        Raises: FingerprintError when the one of that name or place is another; UsageError when there is none.
        """
        with self._lock:
            if self._encoder is None:
                refuse_unknown(self._store)
                place = self._encoder_place or self._neighboring_encoder() or self._store.setting("encoder_place")
                self._encoder = self._checked(_loaded(place or self._store.encoder.name))
            return self._encoder

    @property
    def retriever(self) -> LocalRetriever:
        """What searches the store; to measure and to build upon."""
        return self._retriever

    @property
    def folder(self) -> Path | None:
        """Where the images are kept, None for an index in memory."""
        return self._store.folder

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self._store.encoder.dim

    @property
    def rule(self) -> DedupConfig:
        """When two images count as the same picture."""
        return self._retriever.rule

    @property
    def read_only(self) -> bool:
        """Whether changes stay in memory."""
        return self._store.read_only

    @property
    def ids(self) -> list[str]:
        """The id of every image, in the order of `embeddings`."""
        return self._store.consistently(lambda now: [item.id for item in self._store.items(now.live_rows, now)])

    @property
    def embeddings(self) -> Float16[np.ndarray, "items dim"]:
        """The stored unit vector of every image, in the order they were added."""
        snapshot = self._store.snapshot()
        return self._store.embeddings(snapshot.live_rows, snapshot)

    @property
    def digest(self) -> str:
        """Changes whenever the images, their order, or the rule of de-duplication do."""
        snapshot = self._store.snapshot()
        parts = snapshot.digest(len(snapshot.segments)), np.packbits(snapshot.alive).tobytes().hex(), repr(self.rule)
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def sources(self, ids: Sequence[str]) -> list[str]:
        """Where the images came from. Raises: UsageError for an unknown id."""
        found = self._store.consistently(lambda now: self._store.items(self._rows(ids, now), now))
        return [item.source for item in found]

    def source(self, id_: str) -> str:
        """Where an image came from. Raises: UsageError for an unknown id."""
        return self.sources([id_])[0]

    def preview(self, id_: str) -> Image.Image | None:
        """A picture of at most 64 pixels, None when the image was added without. Raises: UsageError for an unknown id."""
        content = self._store.consistently(lambda now: self._store.preview(int(self._rows([id_], now)[0]), now))
        return Image.open(io.BytesIO(content)).convert("RGB") if content is not None else None

    def plan(self) -> Plan:
        """How the index is searched at its size, and the memory that takes."""
        return self._retriever.plan()

    def info(self) -> dict[str, Any]:
        """Facts to show: count, dim, encoder, fingerprint, engine, bytes on disk, de-duplication, read_only."""
        made = self._store.encoder
        return {
            "count": len(self),
            "dim": made.dim,
            "encoder": made.name,
            "fingerprint": made.fingerprint,
            "engine": self.plan().engine,
            "bytes": self._store.bytes_on_disk(),
            "dedup": to_dict(self.rule),
            "read_only": self.read_only,
        }

    def check(self) -> None:
        """Verify every digest and count. Raises: StoreError listing all that is wrong."""
        found = self._store.problems()
        if self._store.folder is not None and (problem := cache_problem(self._store.folder)):
            found.append(problem)
        if found:
            raise StoreError(
                f"{self._store.name} is not sound: {'; '.join(found)}: restore a copy or build the index again"
            )

    # Inside

    @classmethod
    def _opened(
        cls, store: Store, encoder: JointEncoder | str | Path | None, settings: IndexConfig | None
    ) -> ImageIndex:
        """The index of a store, which is closed when the encoder is another."""
        try:
            return cls(store, encoder, settings)
        except BaseException:
            store.close()
            raise

    def _complete(self) -> None:
        """End a build, also one that was interrupted: it gets its rule when all images are there."""
        if not len(self) or not self._store.setting(BUILDING):
            return
        if self._store.setting("dedup") is None:
            self.set_rule(default_rule(self._store.encoder.name) or calibrate(self._store))
        self._store.set_setting(BUILDING, "")

    def _look_after(self) -> None:
        if self.upkeep is not None:
            self.upkeep.look()

    def _require_writable(self) -> None:
        if self.read_only:
            raise StoreError(
                f"expected an index that can be changed, {self._store.name} is read-only: save a copy of it"
            )

    def _rows(self, ids: Sequence[str], snapshot: Snapshot) -> Int[np.ndarray, "ids"]:
        rows = self._store.rows_of(ids, snapshot)
        if unknown := [one for one, row in zip(ids, rows, strict=True) if row < 0]:
            raise UsageError(
                f"expected the id of an image in {self._store.name}, got {unknown[0]!r}: search to see its ids"
            )
        return rows

    def _checked(self, encoder: JointEncoder) -> JointEncoder:
        refuse_unknown(self._store)
        made = self._store.encoder
        if (encoder.fingerprint, encoder.dim) != (made.fingerprint, made.dim):
            raise FingerprintError(
                f"{self._store.name} was built with {made.name} ({made.dim}-d, {made.fingerprint[:12]}), the encoder is "
                f"{encoder.name} ({encoder.dim}-d, {encoder.fingerprint[:12]}): load that encoder or build the index again"
            )
        return encoder

    def _stored_rule(self) -> DedupConfig:
        stored = self._store.setting("dedup")
        if stored is None:
            return default_rule(self._store.encoder.name) or DedupConfig(cosine=0.98)
        return from_dict(DedupConfig, json.loads(stored), source=self._store.name)

    def _stored_settings(self) -> IndexConfig:
        stored = self._store.setting("reach")
        return from_dict(IndexConfig, json.loads(stored), source=self._store.name) if stored else IndexConfig()

    def _neighboring_encoder(self) -> Path | None:
        """The encoder of the model folder that the index lies in."""
        place = self._store.folder.parent / "encoder" if self._store.folder is not None else None
        return place if place is not None and place.is_dir() else None

    def _abandon(self) -> None:
        """Take away the folder of an index that got no image."""
        self.close()
        folder = self._store.folder
        if folder is not None:
            (folder / DATABASE).unlink(missing_ok=True)
            shutil.rmtree(folder / "segments")
            folder.rmdir()


def _loaded(encoder: JointEncoder | str | Path) -> JointEncoder:
    return load_encoder(encoder) if isinstance(encoder, str | Path) else encoder


def _resolve(path: str | Path) -> Path:
    """The folder itself, or that of a bundled index."""
    bundled = BUNDLES / str(path) / "index"
    return bundled if not (Path(path) / DATABASE).is_file() and (bundled / DATABASE).is_file() else Path(path)


def _per_query(exclude_ids: Excluded | None, count: int) -> list[list[str]] | None:
    if exclude_ids is None:
        return None
    every = list(exclude_ids)
    if all(isinstance(one, str) for one in every):
        return [[str(one) for one in every]] * count
    return [list(one) for one in every]


def _interrupted(path: str | Path | None) -> Store | None:
    """The store of a build that was begun in this folder and is not complete."""
    if path is None or not (Path(path) / DATABASE).is_file():
        return None
    store = Store.open(Path(path))
    if store.setting(BUILDING) and not store.read_only:
        return store
    store.close()
    return None
