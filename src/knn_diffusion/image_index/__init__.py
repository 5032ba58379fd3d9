"""Images to retrieve from, with the encoder that placed them: build, open, add, remove, search."""

from knn_diffusion.image_index.dedup import DedupReport
from knn_diffusion.image_index.distributed import RayConfig
from knn_diffusion.image_index.embedding import Skipped, content_digest
from knn_diffusion.image_index.frozen import FrozenIndex
from knn_diffusion.image_index.index import ImageIndex
from knn_diffusion.image_index.ingest import AddReport
from knn_diffusion.image_index.tokenizing import TokenOutput

__all__ = [
    "AddReport",
    "DedupReport",
    "FrozenIndex",
    "ImageIndex",
    "RayConfig",
    "Skipped",
    "TokenOutput",
    "content_digest",
]
