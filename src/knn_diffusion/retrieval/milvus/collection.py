"""What a collection looks like: its fields, its index, and what it knows about the encoder that made its vectors.

    id, source, key, content      text; the id is the primary key
    id_lower, source_lower, …     the same in small ASCII letters, for LIKE
    added_at, position            seconds since 1970, and the order in which images were added
    thumbnail                     the 8×8 picture in base64, empty where there is none
    embedding                     float16 unit vector (milvus-lite has no such type and gets the same values as float32)

The collection's property `knn_diffusion` holds encoder and rule of de-duplication; a cluster's description repeats it.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Float16, Int16, UInt8

from knn_diffusion.config import config, from_dict, require, to_dict
from knn_diffusion.errors import ConfigError, StoreError, UsageError
from knn_diffusion.retrieval.database import text
from knn_diffusion.retrieval.dedup import DedupConfig
from knn_diffusion.retrieval.milvus.condition import LOWER, ascii_lower
from knn_diffusion.retrieval.milvus.connection import Connection
from knn_diffusion.retrieval.plan import Modality, Reach
from knn_diffusion.retrieval.segments import THUMBNAIL_VALUES, unit_rows
from knn_diffusion.retrieval.store import EncoderIdentity, Item

FORMAT_VERSION = 1
FACTS = "knn_diffusion"
VECTOR = "embedding"
METRIC = "COSINE"
TEXT_BYTES = {"id": 512, "source": 4096, "key": 4096, "content": 64}
"""Longest value of each field of text, in UTF-8."""
ROUNDING = 1e-3
"""Float16 makes the length of a unit vector differ from 1 by less."""
SEARCHED = ("id", "source", "key")
"""Fields that LIKE may look into."""
OUTPUT = ["position", "thumbnail", VECTOR]
"""Fields that a search brings back for every candidate."""

IndexKind = Literal["FLAT", "IVF_FLAT", "IVF_SQ8", "IVF_RABITQ", "HNSW"]
INDEX_KINDS: tuple[IndexKind, ...] = ("FLAT", "IVF_FLAT", "IVF_SQ8", "IVF_RABITQ", "HNSW")
MAX_EF = 32_768
MILVUS_CELLS = 128
"""Cells of an IVF index that Milvus was not told the number for."""


@config
class MilvusConfig:
    """How a collection is indexed, searched and waited for.

    index            kind of Milvus's vector index; None: FLAT in milvus-lite, IVF_SQ8 on a server
    cells            cells of each of Milvus's segments (of about a million images), in 1 … 65,536
    image, text      how far queries look, as in the index on this machine: cells, and candidates for each neighbor that
                     IVF_RABITQ and HNSW compare more closely
    consistency      Strong sees everything that was acknowledged before; Bounded may be some seconds late, and is faster
    timeout_seconds  for every call to the server
    """

    index: IndexKind | None = None
    cells: int = 1024
    image: Reach = Reach(probes=20, depth=10)
    text: Reach = Reach(probes=128, depth=20)
    consistency: Literal["Strong", "Session", "Bounded", "Eventually"] = "Strong"
    timeout_seconds: float = 10.0

    def __post_init__(self) -> None:
        known = (None, *INDEX_KINDS)
        require(self.index in known, "index", self.index, f"one of {', '.join(INDEX_KINDS)} or None")
        require(1 <= self.cells <= 65_536, "cells", self.cells, "in 1 … 65,536")
        levels = ("Strong", "Session", "Bounded", "Eventually")
        require(self.consistency in levels, "consistency", self.consistency, f"one of {', '.join(levels)}")
        require(self.timeout_seconds > 0, "timeout_seconds", self.timeout_seconds, "above 0")

    def reach(self, modality: Modality) -> Reach:
        """How far a query of this kind looks."""
        return self.text if modality == "text" else self.image


@dataclass(frozen=True, kw_only=True, slots=True)
class VectorIndex:
    """The index that a collection has."""

    kind: str
    cells: int

    def search_parameters(self, reach: Reach, limit: int) -> dict[str, int | float]:
        """Milvus's parameters for a search that looks so far and fetches `limit` candidates."""
        if self.kind == "HNSW":
            return {"ef": min(max(limit, reach.depth * reach.probes), max(limit, MAX_EF))}
        if not self.kind.startswith("IVF"):
            return {}
        refine = {"refine_k": float(reach.depth)} if self.kind == "IVF_RABITQ" else {}
        return {"nprobe": min(reach.probes, self.cells), **refine}

    def looks_everywhere(self, reach: Reach) -> bool:
        """Whether such a search could not look any further."""
        if self.kind == "HNSW":
            return reach.depth * reach.probes >= MAX_EF
        return not self.kind.startswith("IVF") or reach.probes >= self.cells


def building_parameters(kind: str, cells: int) -> dict[str, Any]:
    """What Milvus is told when it builds the index."""
    if kind == "HNSW":
        return {"M": 32, "efConstruction": 200}
    refine = {"refine": True, "refine_type": "SQ8"} if kind == "IVF_RABITQ" else {}
    return {"nlist": cells, **refine} if kind.startswith("IVF") else {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What a collection knows about itself."""

    encoder: EncoderIdentity
    rule: DedupConfig

    def to_json(self) -> str:
        """The text kept with the collection."""
        known = {"format_version": FORMAT_VERSION, "encoder": asdict(self.encoder), "dedup": to_dict(self.rule)}
        return json.dumps(known)

    @classmethod
    def from_described(cls, described: Mapping[str, Any], name: str) -> Facts:
        """The facts in what Milvus says of a collection. Raises: StoreError when it holds none of ours."""
        kept = dict(described.get("properties") or {}).get(FACTS) or described.get("description") or "{}"
        try:
            known = json.loads(kept)
            version = known["format_version"]
            if version == FORMAT_VERSION:
                rule = from_dict(DedupConfig, known["dedup"], source=name)
                return cls(encoder=EncoderIdentity(**known["encoder"]), rule=rule)
        except (ValueError, TypeError, KeyError, ConfigError):
            raise StoreError(
                f"{name} does not say which encoder made it: name a collection that knn-diffusion made"
            ) from None
        raise StoreError(f"{name} has format {version}, this version reads {FORMAT_VERSION}: upgrade knn-diffusion")


def create_collection(connection: Connection, name: str, facts: Facts, settings: MilvusConfig) -> None:
    """Make an empty collection with its index, and load it."""
    from pymilvus import DataType, MilvusClient

    schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False, description=facts.to_json())
    for field, most in TEXT_BYTES.items():
        schema.add_field(field, DataType.VARCHAR, max_length=most, is_primary=field == "id")
    for field in SEARCHED:
        schema.add_field(field + LOWER, DataType.VARCHAR, max_length=TEXT_BYTES[field])
    schema.add_field("added_at", DataType.DOUBLE)
    schema.add_field("position", DataType.INT64)
    schema.add_field("thumbnail", DataType.VARCHAR, max_length=4 * THUMBNAIL_VALUES // 3)
    kind = DataType.FLOAT_VECTOR if connection.lite else DataType.FLOAT16_VECTOR
    schema.add_field(VECTOR, kind, dim=facts.encoder.dim)
    index = settings.index or ("FLAT" if connection.lite else "IVF_SQ8")
    indexes = MilvusClient.prepare_index_params()
    parameters = building_parameters(index, settings.cells)
    if connection.lite:  # it overlooks parameters that lie beside the kind, where the client puts them
        parameters = {"params": parameters}
    indexes.add_index(VECTOR, index_type=index, index_name=VECTOR, metric_type=METRIC, params=parameters)
    connection.call(
        "create_collection",
        collection_name=name,
        schema=schema,
        consistency_level=settings.consistency,
        properties={FACTS: facts.to_json()},
    )
    connection.call(
        "create_index", collection_name=name, index_params=indexes, sync=False
    )  # of nothing: no need to wait
    connection.call("load_collection", collection_name=name)


def vector_index(connection: Connection, name: str) -> VectorIndex:
    """The index that the collection has now."""
    found = connection.call("describe_index", collection_name=name, index_name=VECTOR) or {}
    told = {**found, **(found.get("params") or {})}  # servers put the parameters beside the kind, milvus-lite below it
    return VectorIndex(kind=str(told.get("index_type", "FLAT")), cells=int(told.get("nlist", MILVUS_CELLS)))


def as_stored(embeddings: Float[np.ndarray, "rows width"], dim: int, what: str) -> Float16[np.ndarray, "rows dim"]:
    """The vectors' directions in float16; those that are that already, as they come from a store, stay as they are.

    Raises: as `unit_rows`.
    """
    vectors = unit_rows(embeddings, dim, what).astype(np.float16)
    if embeddings.dtype == np.float16:  # rounding a rounded direction again would move it
        kept = np.abs(np.linalg.norm(embeddings.astype(np.float64), axis=1) - 1) < ROUNDING
        vectors[kept] = embeddings[kept]
    return vectors


def row_of(
    item: Item,
    vector: Float16[np.ndarray, "dim"],
    thumbnail: UInt8[np.ndarray, "values"] | None,
    added_at: float,
    position: int,
    *,
    lite: bool,
) -> dict[str, Any]:
    """One image as Milvus takes it. Raises: UsageError for a text that is too long."""
    row: dict[str, Any] = {field: text(getattr(item, field)) for field in TEXT_BYTES}
    for field, most in TEXT_BYTES.items():
        if len(row[field].encode()) > most:
            raise UsageError(f"{field} of image {row['id'][:40]!r}: expected at most {most} bytes, got "
                             f"{len(row[field].encode())}: shorten it")  # fmt: skip
    row |= {field + LOWER: ascii_lower(row[field]) for field in SEARCHED}
    picture = "" if thumbnail is None else base64.b64encode(thumbnail.tobytes()).decode()
    vector_value = vector.astype(np.float32).tolist() if lite else vector
    return row | {"added_at": added_at, "position": position, "thumbnail": picture, VECTOR: vector_value}


def stored_vector(value: Any) -> Float16[np.ndarray, "dim"]:
    """An embedding as Milvus gives it back: numbers for float32, bytes for float16."""
    while isinstance(value, list) and value and isinstance(value[0], bytes):
        value = value[0]
    return np.frombuffer(value, np.float16) if isinstance(value, bytes) else np.asarray(value, np.float16)


def stored_picture(value: str) -> Int16[np.ndarray, "values"]:
    """An 8×8 picture as `dedup` takes it, -1 where there is none."""
    if not value:
        return np.full(THUMBNAIL_VALUES, -1, np.int16)
    return np.frombuffer(base64.b64decode(value), np.uint8).astype(np.int16)
