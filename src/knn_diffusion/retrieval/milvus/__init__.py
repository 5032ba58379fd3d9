"""The distributed home of an image index: a Milvus collection that answers the same `search` as the index on this machine."""

from knn_diffusion.retrieval.milvus.collection import MilvusConfig
from knn_diffusion.retrieval.milvus.retriever import MilvusRetriever
from knn_diffusion.retrieval.milvus.transfer import PushReport, collection_name, push

__all__ = ["MilvusConfig", "MilvusRetriever", "PushReport", "collection_name", "push"]
