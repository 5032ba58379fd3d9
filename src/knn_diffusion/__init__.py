"""KNN-Diffusion: a pile of images without captions becomes a text-to-image generator.

    from knn_diffusion import KnnDiffusion
    pipe = KnnDiffusion.from_pretrained("stickers")
    pipe("a red heart").images[0].save("heart.png")

Importing the package is instant: each name below loads its module when it is first used.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from knn_diffusion.errors import (
        CheckpointError,
        ConfigError,
        FingerprintError,
        ImageError,
        KnnDiffusionError,
        MissingDependencyError,
        StoreError,
        TrainingError,
        UsageError,
    )
    from knn_diffusion.image_index import ImageIndex
    from knn_diffusion.pipeline import KnnDiffusion
    from knn_diffusion.request import Output

# Threads of a computation wait for each other hundreds of times an image. GNU's OpenMP lets them wait at full speed for long,
# also for one whose processor does something else: a busy machine of two processors took 3 to 18 s for what takes 0.33 s.
# Waiting briefly costs 6 % where nothing else runs. It is read when torch is imported; who has set it is left alone.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "FingerprintError",
    "ImageError",
    "ImageIndex",
    "KnnDiffusion",
    "KnnDiffusionError",
    "MissingDependencyError",
    "Output",
    "StoreError",
    "TrainingError",
    "UsageError",
    "__version__",
]

_MODULES = {"KnnDiffusion": "pipeline", "Output": "request", "ImageIndex": "image_index"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
