"""Images to retrieve from: an encoder, a store and a search, in one object.

    index = ImageIndex.build(["photos"], "my-index", encoder="stickers")
    index.search_text("a red heart", k=5).ids
    index.add(["new/*.png"])

The folder is the truth (`retrieval/store.py`); everything else here is made from it when it is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from knn_diffusion import images as pictures
from knn_diffusion.checkpoint import atomic_folder
from knn_diffusion.errors import ImageError, StoreError, UsageError
from knn_diffusion.image_index import building
from knn_diffusion.image_index.dedup import DedupReport, find_copies
from knn_diffusion.image_index.distributed import RayConfig
from knn_diffusion.image_index.encoder import AnyEncoder, IndexEncoder, identity_of, keep_place, loaded
from knn_diffusion.image_index.exchange import Claim, import_files
from knn_diffusion.image_index.exclusion import Excluded, per_query, require_list
from knn_diffusion.image_index.facts import IndexFacts
from knn_diffusion.image_index.frozen import FrozenIndex
from knn_diffusion.image_index.ingest import AddReport, Images, find_sources
from knn_diffusion.image_index.metadata_table import Tables
from knn_diffusion.image_index.queries import Vectors, as_texts, as_vectors
from knn_diffusion.image_index.settings import keep_reach, keep_rule, stored_rule, stored_settings
from knn_diffusion.image_index.shared import Place, find_index
from knn_diffusion.image_index.sync import SyncPlan, plan_sync
from knn_diffusion.image_index.tokenizing import TokenOutput, tokenize_units
from knn_diffusion.image_index.upkeep import Upkeep, require_writable
from knn_diffusion.progress import Progress
from knn_diffusion.retrieval.compaction import Waste
from knn_diffusion.retrieval.dedup import OFF, DedupConfig, calibrate
from knn_diffusion.retrieval.drift import Drift, drift
from knn_diffusion.retrieval.index import LocalRetriever
from knn_diffusion.retrieval.interchange import (
    ExportReport,
    ImportReport,
    Layout,
    Sources,
    export_vectors,
    find_vectors,
)
from knn_diffusion.retrieval.near_duplicates import NearDuplicateRule
from knn_diffusion.retrieval.plan import IndexConfig, Modality, Plan, plan_for
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import Store
from knn_diffusion.shapes import Neighbors
from knn_diffusion.tokens import TokenFolder, Tokenize, Unit


class ImageIndex(IndexFacts):
    """A folder of images that can be searched by text, by image and by vector.

    Reads may come from any number of threads. An index that is read-only (inside the package, of the hub, or without write
    permission) takes `add` and `remove` in memory only; `save` keeps them elsewhere.
    """

    def __init__(
        self,
        store: Store,
        encoder: AnyEncoder | None = None,
        settings: IndexConfig | None = None,
        place: Place | None = None,
    ) -> None:
        retriever = LocalRetriever(store, settings or stored_settings(store), stored_rule(store))
        super().__init__(store, IndexEncoder(store, encoder, place), retriever)
        self.report: AddReport | None = None
        """What `build` did with its images."""
        self.import_report: ImportReport | None = None
        """What `import_embeddings` did with its vectors."""
        self.upkeep: Upkeep | None = None
        """What compacts the index in the background, see `keep_compact`."""

    @classmethod
    def build(
        cls,
        images: Images,
        path: str | Path | None,
        encoder: AnyEncoder,
        *,
        progress: Progress | None = None,
        announce: Callable[[Plan], None] | None = None,
        previews: bool = True,
        settings: IndexConfig | None = None,
        rule: DedupConfig | None = None,
        ray: RayConfig | None = None,
        metadata: Tables | None = None,
        tokens: TokenOutput | None = None,
    ) -> ImageIndex:
        """A new index of the images in a new folder, or in memory when `path` is None; `report` says what was skipped.

        Args:
            images: folders, files, wildcards, tar shards, parquet tables, or pictures.
            encoder: a joint encoder, or the name or folder of one.
            announce: told how so many images will be searched and what that takes, before the work begins.
            previews: keep a small picture of each image, framed, to show neighbors by.
            rule: when two images count as the same; None takes the encoder's, or calibrates one on these images.
            ray: spread the work over processes or machines. The index is the same, and an interrupted build goes on
                with the same call.
            metadata: tables of what is known of the images, as in `add`.
            tokens: make and keep the images' tokens in the same pass, as in `add`.

        Raises: UsageError when the folder exists or no image is found; ImageError when none can be used; with `ray`, what
            `add` raises, and FingerprintError when another encoder began the build. After an interruption the folder holds
            what was added so far, and `add` goes on from there.
        """
        found, made_by = find_sources(images), loaded(encoder)
        if announce is not None:
            announce(plan_for(len(found), made_by.dim, settings or IndexConfig()))
        folder = Path(path) if path is not None else None
        resume = ray is not None or tokens is not None
        store = building.begin(folder, identity_of(made_by), resume=resume)
        index = cls._opened(store, made_by, settings)
        with building.filling(store):
            keep_place(store, encoder)
            if rule is not None:
                index.set_rule(rule)
            report = index.report = index.add(
                found, progress=progress, previews=previews, ray=ray, metadata=metadata, tokens=tokens
            )
            if not len(index):
                first = report.skipped[0]
                raise ImageError(
                    f"none of {len(found)} images could be used (first: {first.source}: {first.reason}): mend or replace them"
                )
        index._retriever.prepare(progress)
        return index

    @classmethod
    def open(
        cls,
        path: str | Path,
        encoder: AnyEncoder | None = None,
        *,
        read_only: bool = False,
        settings: IndexConfig | None = None,
    ) -> ImageIndex:
        """The index in a folder, the bundled one of that name, or one of the hub ("owner/name").

        One of the hub is downloaded unless it is in the hub's cache, and opens read-only.

        Args:
            encoder: the one the index was built with; None loads it when first needed.

        Raises: StoreError when there is no sound index; FingerprintError when it was built with another encoder; HubError
        when the hub does not have it or cannot be reached.
        """
        place = find_index(path)
        store = Store.open(place.folder, read_only=read_only or place.repository is not None)
        return cls._opened(store, encoder, settings, place)

    @classmethod
    def import_embeddings(
        cls,
        source: Sources,
        path: str | Path,
        encoder: AnyEncoder | None = None,
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
        files = find_vectors(source, ids=ids, provenance=provenance)
        claim = Claim(encoder=encoder, name=encoder_name, dim=dim)
        store, report = import_files(files, Path(path), claim, progress)
        index = cls._opened(store, encoder, settings)
        index.import_report = report
        index._retriever.prepare(progress)
        return index

    # Changing

    def add(
        self,
        images: Images,
        *,
        progress: Progress | None = None,
        previews: bool = True,
        ray: RayConfig | None = None,
        metadata: Tables | None = None,
        tokens: TokenOutput | None = None,
    ) -> AddReport:
        """Add images; each batch is on the disk, and found by searches, when the next one starts.

        An image that cannot be read is listed with its reason and passed over; one that is there already, pixel for
        pixel, is counted and passed over. A build that was interrupted is complete when this returns.

        Args:
            ray: spread decoding and embedding over processes or machines. An image under a known absolute path, in a file
                that has not changed since, is then passed over unread.
            metadata: .csv, .jsonl or .parquet tables with a column `source` or `key` that names the image; the others
                become columns of `where`. Images that are there already keep what they have.
            tokens: also tokenize the images for a training, those that are there already too. What is tokenized and in
                the index is passed over unread, shard by shard.

        Raises: UsageError when no image is found; FingerprintError for a folder of other tokens; KnnDiffusionError when the disk is full, or Ray gives up: earlier
            batches stay. MissingDependencyError without Ray.
        """
        report = building.add(
            self._store,
            self._encoder,
            images,
            metadata,
            previews=previews,
            ray=ray,
            tokens=tokens,
            progress=progress,
        )
        building.complete(self._store, self.encoder)
        self._retriever.rule = stored_rule(self._store)
        self._look_after()
        return report

    def remove(self, ids: Sequence[str]) -> None:
        """Remove images; the next search does not find them.

        Raises: UsageError naming an unknown id, before anything is removed.
        """
        require_list(ids)
        self._store.remove(ids)
        self._look_after()

    def sync(self, folder: str | Path, *, progress: Progress | None = None) -> SyncPlan:
        """What is new, changed and gone in a folder since its images were added; `apply` of what is returned does it.

        Raises: UsageError when the folder holds no image.
        """
        return plan_sync(self, self._store, Path(folder), progress)

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
        return find_copies(self._store, rule, device=device, progress=progress, removed=self._look_after)

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
        require_writable(self._store)
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
        require_writable(self._store)
        return self._retriever.retrain(progress)

    def drift(self) -> Drift | None:
        """How well cells and codes fit the images that came after their training; without a search, in about a second.

        None where every image is compared, and where no later images are.
        """
        return drift(self._retriever)

    def set_rule(self, rule: DedupConfig) -> None:
        """Keep with the index when two of its images count as the same picture."""
        keep_rule(self._store, rule)
        self._retriever.rule = rule

    def calibrated_rule(self) -> DedupConfig:
        """The rule as measured on the pictures there are now, see `retrieval.dedup.calibrate`; changes nothing.

        Raises: UsageError when no two images of the index have pictures that differ.
        """
        if (found := calibrate(self._store)) is None:
            raise UsageError(
                f"expected images with pictures to calibrate on, {self._store.name} has no two that differ: name a cosine "
                "(0.9 is the paper's, for CLIP)"
            )
        return found

    def set_reach(self, settings: IndexConfig) -> None:
        """Keep with the index how far queries look, as `tune` found it; its other settings stay those of each opening.

        Raises: StoreError when the index is read-only.
        """
        require_writable(self._store)
        keep_reach(self._store, settings)
        self._retriever.settings = settings

    def save(self, path: str | Path, *, sealed: bool = False) -> None:
        """Write the index as it is now, additions in memory included, into a new folder.

        Args:
            sealed: the copy opens read-only and its folder never changes, as inside a package.

        Raises: UsageError when the folder exists; KnnDiffusionError when the disk is full, and then nothing is left.
        """
        target = Path(path)
        building.require_utf8(target)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UsageError(f"expected a new folder for the index, {target} exists: choose another")

        def copy(_: Snapshot) -> None:
            with atomic_folder(target) as temporary:
                self._store.copy_to(temporary, sealed=sealed)

        self._store.consistently(copy)

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

    def overlay(self) -> ImageIndex:
        """The images of this index's folder in one that changes in memory only; this one stays as it is.

        Raises: StoreError for an index that was never in a folder.
        """
        if self._store.folder is None:
            raise StoreError("expected an index in a folder to lay changes over, this one is in memory: save it first")
        return self._opened(
            Store.open(self._store.folder, read_only=True), self._encoder.given, None, self._encoder.place
        )

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
        queries: Vectors,
        k: int,
        exclude_ids: Excluded | None = None,
        where: str | None = None,
        *,
        modality: Modality = "image",
        deduplicate: bool = True,
    ) -> Neighbors:
        """The k nearest images of each vector, best first, copies of a better one left out.

        Args:
            queries: an array, tensor or list of vectors, or one vector.
            exclude_ids: ids no query may find, or for each query the ids it may not find.
            where: an SQL condition over id, source, key, added_at and the names of metadata, such as
                `source LIKE '%fruit%' AND width >= 512`.
            modality: what the vectors are embeddings of; among very many images texts must look further.

        Raises: UsageError when k is below 1 or beyond the index, or `where` is no condition; FingerprintError when the
            vectors have another width.
        """
        vectors = as_vectors(queries)
        excluded = per_query(exclude_ids, len(vectors))
        rule = None if deduplicate else OFF
        return self._retriever.search(vectors, k, excluded, where, modality=modality, rule=rule)

    def search_text(self, text: str | Sequence[str], k: int, **options: Any) -> Neighbors:
        """The k images nearest to each text; options as in `search`."""
        queries = self.encoder.encode_texts(as_texts(text))
        return self.search(queries, k, modality="text", **options)

    def search_image(self, image: str | Path | Image.Image, k: int, **options: Any) -> Neighbors:
        """The k images nearest to an image, the image itself first if it is in the index; options as in `search`."""
        return self.search(self.encoder.encode_images([pictures.open_image(image)]), k, **options)

    # Training

    def tokenize(
        self,
        units: Sequence[Unit],
        folder: TokenFolder,
        tokenize: Tokenize,
        *,
        progress: Progress | None = None,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        """Make those units of a folder of tokens that are not there; the index stays as it is.

        Images that it has, by their pixels or as imported embeddings of the same names, need not be encoded.

        Args: notice: told in a line of images whose names are those of others.

        Raises: FingerprintError when the encoder is not at hand; KnnDiffusionError when the disk is full.
        """
        tokenize_units(units, folder, tokenize, self._store, self.encoder, progress=progress, notice=notice)

    def frozen(self) -> FrozenIndex:
        """The index as it is now, for a training to look up neighbors in, whatever becomes of it meanwhile."""
        return FrozenIndex(self._store, self.rule)

    # Inside

    @classmethod
    def _opened(
        cls, store: Store, encoder: AnyEncoder | None, settings: IndexConfig | None, place: Place | None = None
    ) -> ImageIndex:
        """The index of a store, which is closed when the encoder is another."""
        try:
            return cls(store, encoder, settings, place)
        except BaseException:
            store.close()
            raise

    def _look_after(self) -> None:
        if self.upkeep is not None:
            self.upkeep.look()
