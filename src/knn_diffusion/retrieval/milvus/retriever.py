"""A collection of images in Milvus, to add to, remove from and search as the index on this machine.

with MilvusRetriever.open("http://milvus:19530", "photos") as retriever:
    retriever.search(encoder.encode_texts(["a red heart"]), k=10, modality="text").ids
"""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, UInt8

from knn_diffusion.errors import FingerprintError, StoreError, UsageError
from knn_diffusion.retrieval.database import text
from knn_diffusion.retrieval.dedup import DedupConfig
from knn_diffusion.retrieval.index import require_one_each
from knn_diffusion.retrieval.items import ID_LENGTH, EncoderIdentity, Item
from knn_diffusion.retrieval.milvus.candidates import MAX_FETCH, Search, answer
from knn_diffusion.retrieval.milvus.collection import (
    Facts,
    MilvusConfig,
    as_stored,
    create_collection,
    row_of,
    vector_index,
)
from knn_diffusion.retrieval.milvus.condition import milvus_expression, quoted
from knn_diffusion.retrieval.milvus.connection import Connection
from knn_diffusion.retrieval.plan import Modality
from knn_diffusion.retrieval.segments import unit_rows
from knn_diffusion.shapes import Neighbors

MAX_NAME = 255
_PIECE = 1000  # rows of one request
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


class MilvusRetriever:
    """Searches a collection in Milvus, from any number of threads, and from as many machines as the server bears."""

    def __init__(self, connection: Connection, collection: str, facts: Facts, settings: MilvusConfig) -> None:
        self.collection, self.settings = collection, settings
        self.encoder, self.rule = facts.encoder, facts.rule
        self._connection = connection
        self._index = vector_index(connection, collection)

    @classmethod
    def create(
        cls,
        uri: str,
        collection: str,
        identity: EncoderIdentity,
        *,
        token: str | None = None,
        settings: MilvusConfig | None = None,
        rule: DedupConfig | None = None,
        exist_ok: bool = False,
    ) -> MilvusRetriever:
        """A new, empty collection.

        Args:
            uri: `http://host:19530` of a server, or a file ending in .db for milvus-lite.
            identity: the encoder of the vectors to come; it is kept with the collection.
            token: `user:password` or an API key.
            rule: when two images count as the same picture; kept with the collection.
            exist_ok: open the collection of that name, as `open`, if there is one.

        Raises: UsageError when the collection exists or its name is none; StoreError when the server cannot be reached.
        """
        settings = settings or MilvusConfig()
        connection = _connected(uri, collection, token, settings)
        if connection.call("has_collection", collection_name=collection):
            if exist_ok:
                return cls.open(uri, collection, identity, token=token, settings=settings)
            raise UsageError(
                f"expected a new collection, {collection} exists at {connection.uri}: choose another name or open it"
            )
        facts = Facts(encoder=identity, rule=rule or DedupConfig())
        create_collection(connection, collection, facts, settings)
        return cls(connection, collection, facts, settings)

    @classmethod
    def open(
        cls,
        uri: str,
        collection: str,
        identity: EncoderIdentity | None = None,
        *,
        token: str | None = None,
        settings: MilvusConfig | None = None,
    ) -> MilvusRetriever:
        """The collection of that name.

        Args:
            identity: the encoder that the caller will use; None: any.

        Raises: StoreError when there is none, it is not ours, or the server cannot be reached; FingerprintError when
            another encoder made it.
        """
        settings = settings or MilvusConfig()
        connection = _connected(uri, collection, token, settings)
        name = f"collection {collection} at {connection.uri}"
        if not connection.call("has_collection", collection_name=collection):
            raise StoreError(
                f"expected {name}, there is none: check the name, or fill it with knn-diffusion index push"
            )
        facts = Facts.from_described(connection.call("describe_collection", collection_name=collection), name)
        made = facts.encoder
        if identity is not None and (identity.fingerprint, identity.dim) != (made.fingerprint, made.dim):
            raise FingerprintError(
                f"{name} was built with {made.name} ({made.dim}-d, {made.fingerprint[:12]}), the encoder is "
                f"{identity.name} ({identity.dim}-d, {identity.fingerprint[:12]}): load that encoder or choose another "
                "collection"
            )
        connection.call("load_collection", collection_name=collection)
        return cls(connection, collection, facts, settings)

    def close(self) -> None:
        """Let go of the connection; milvus-lite keeps its file until the process ends."""
        self._connection.close()

    def __enter__(self) -> MilvusRetriever:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def uri(self) -> str:
        """Where the server or the file is, without a password."""
        return self._connection.uri

    @property
    def name(self) -> str:
        """How messages call the collection."""
        return f"collection {self.collection} at {self.uri}"

    def __len__(self) -> int:
        counted = self._query("", ["count(*)"])
        return int(counted[0]["count(*)"])

    def sources(self, ids: Sequence[str]) -> list[str]:
        """Where the images came from. Raises: UsageError for an unknown id."""
        found = self._fields(ids, "source")
        self._all_known(ids, found)
        return [found[text(one)] for one in ids]

    # Changing

    def add(
        self,
        items: Sequence[Item],
        embeddings: Float[np.ndarray, "items width"],
        thumbnails: UInt8[np.ndarray, "items values"] | None = None,
        *,
        added_at: Float64[np.ndarray, "items"] | None = None,
        positions: Int64[np.ndarray, "items"] | None = None,
        flush: bool = True,
    ) -> Bool[np.ndarray, "items"]:
        """Add images; those that are there already, by id and content, stay as they are.

        After a failure some may have been added: add the same again.

        Args:
            embeddings: vectors of any length but zero; what is stored is their direction in float16.
            added_at: seconds since 1970; None: now.
            positions: their place in the order of addition, which decides between equal scores; None: after all others.
            flush: False spares milvus-lite a `flush` when more follows.

        Returns: which were added.
        Raises: FingerprintError for another width; UsageError for vectors that are zero or not finite and for an id taken
            by other content; StoreError when the server fails.
        """
        vectors = as_stored(embeddings, self.encoder.dim, f"{self.name}, embeddings")
        now, added = time.time_ns(), np.zeros(len(items), bool)
        for start in range(0, len(items), _PIECE):
            new = self._new(items, range(start, min(start + _PIECE, len(items))))
            rows = [
                row_of(
                    item,
                    vectors[place],
                    None if thumbnails is None else thumbnails[place],
                    now / 1e9 if added_at is None else float(added_at[place]),
                    now + place if positions is None else int(positions[place]),
                    lite=self._connection.lite,
                )
                for place, item in new.items()
            ]
            if rows:
                self._connection.call("upsert", collection_name=self.collection, data=rows)
            added[list(new)] = True
        if flush:
            self.flush()
        return added

    def remove(self, ids: Sequence[str]) -> None:
        """Remove images; the next search does not see them.

        Raises: UsageError naming the first unknown id, before anything is removed.
        """
        found = self._fields(ids, "content")
        self._all_known(ids, found, "; nothing was removed")
        for piece in _pieces(sorted(found)):
            # the client's own delete(ids=…) does not escape quotes in them
            self._connection.call("delete", collection_name=self.collection, filter=_one_of(piece))

    def flush(self) -> None:
        """Have milvus-lite write and index what was added, so that searches stay fast; a server does so by itself."""
        if self._connection.lite:
            self._connection.call("flush", collection_name=self.collection)

    # Searching

    def search(
        self,
        queries: Float[np.ndarray, "queries dim"],
        k: int,
        exclude_ids: Sequence[Collection[str]] | None = None,
        where: str | None = None,
        *,
        modality: Modality = "image",
        rule: DedupConfig | None = None,
        drop_copies_of_query: bool = False,
    ) -> Neighbors:
        """The k nearest images of each query, see Retriever.

        Args:
            modality: of the queries; texts look further.
            rule: instead of the collection's own; `dedup.OFF` keeps duplicates.
            drop_copies_of_query: queries are images, and near-copies of them must not be found (A.4, as in training).

        Raises: UsageError when k is below 1 or beyond the collection, a query is zero or not finite, or `where` is beyond
            what Milvus can be asked; FingerprintError when the queries have another width; StoreError when the server
            fails or the collection is empty.
        """
        require_one_each(exclude_ids, len(queries))
        if not 1 <= k <= MAX_FETCH:
            self._check_k(k)
        search = Search(
            connection=self._connection,
            collection=self.collection,
            index=self._index,
            consistency=self.settings.consistency,
            expression=milvus_expression(where) if where is not None else "",
            reach=self.settings.reach(modality),
            rule=rule or self.rule,
            drop_copies=drop_copies_of_query,
        )
        units = unit_rows(queries, self.encoder.dim, "queries")
        given = exclude_ids if exclude_ids is not None else [()] * len(units)
        found = search.run(units, k, [{text(one) for one in ids} for ids in given])
        if any(len(one.chosen) < k for one in found):
            self._check_k(k)
        return answer(found, k, self.encoder.dim)

    # Inside

    def _check_k(self, k: int) -> None:
        count = len(self)
        if count == 0:
            raise StoreError(f"{self.name} holds no images: add some before searching")
        if not 1 <= k <= count:
            raise UsageError(
                f"k must be between 1 and {count}, the number of images in {self.name}, got {k}: change k or add images"
            )

    def _new(self, items: Sequence[Item], places: range) -> dict[int, Item]:
        """Which of the items at those places are not there yet, with their ids."""
        contents = self._fields([id_ for place in places for id_ in _possible_ids(items[place])], "content")
        new: dict[int, Item] = {}
        for place in places:
            item = items[place]
            for id_ in _possible_ids(item):
                if contents.setdefault(id_, "") in ("", item.content):
                    break
            else:
                raise UsageError(
                    f"id {item.id!r} is taken by other content in {self.name}: choose another id or remove that image first"
                )
            if not contents[id_]:
                contents[id_], new[place] = item.content, replace(item, id=id_)
        return new

    def _fields(self, ids: Sequence[str], field: str) -> dict[str, str]:
        """A field of those of the images that are there, by id."""
        found: dict[str, str] = {}
        for piece in _pieces(sorted({text(one) for one in ids})):
            found.update({row["id"]: row[field] for row in self._query(_one_of(piece), ["id", field])})
        return found

    def _all_known(self, ids: Sequence[str], found: Collection[str], consequence: str = "") -> None:
        if unknown := [one for one in ids if text(one) not in found]:
            raise UsageError(
                f"expected ids of images in {self.name}, got {unknown[0]!r} ({len(unknown)} of {len(ids)} unknown): "
                f"search to see its ids{consequence}"
            )

    def _query(self, expression: str, fields: list[str]) -> list[dict[str, Any]]:
        return self._connection.call(
            "query",
            collection_name=self.collection,
            filter=expression,
            output_fields=fields,
            consistency_level="Strong",
        )


def _connected(uri: str, collection: str, token: str | None, settings: MilvusConfig) -> Connection:
    if not _NAME.fullmatch(collection) or len(collection) > MAX_NAME:
        raise UsageError(
            f"expected a collection's name of letters, digits and underscores, not beginning with a digit, got "
            f"{collection[:40]!r}: choose another"
        )
    return Connection(uri, token, settings.timeout_seconds)


def _possible_ids(item: Item) -> list[str]:
    """The id it was given, or what the store takes for one: the beginning of the content digest, else all of it."""
    return [text(item.id)] if item.id else [item.content[:ID_LENGTH], item.content]


def _one_of(ids: Sequence[str]) -> str:
    return f"id in [{', '.join(quoted(one) for one in ids)}]"


def _pieces(values: list[str]) -> Iterator[list[str]]:
    return (values[start : start + _PIECE] for start in range(0, len(values), _PIECE))
