"""Embeddings in and out, in the files of other tools: clip-retrieval and autofaiss folders, plain .npy, faiss."""

from knn_diffusion.retrieval.interchange.reading import ImportReport, SkippedRow, import_vectors
from knn_diffusion.retrieval.interchange.vector_files import Sources, VectorFiles, find_vectors
from knn_diffusion.retrieval.interchange.writing import ExportReport, Layout, export_vectors

__all__ = [
    "ExportReport",
    "ImportReport",
    "Layout",
    "SkippedRow",
    "Sources",
    "VectorFiles",
    "export_vectors",
    "find_vectors",
    "import_vectors",
]
