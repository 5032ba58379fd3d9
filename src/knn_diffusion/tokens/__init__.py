"""Training examples of the denoiser on disk: tokens and embedding of every image, made once, shard by shard."""

from knn_diffusion.tokens.examples import CONTENT_BYTES, Examples, Makers
from knn_diffusion.tokens.parts import PART_IMAGES, Made, TokenFolder, UnitFacts
from knn_diffusion.tokens.tokenize import Tokenize, makers_of
from knn_diffusion.tokens.units import Unit, units_of, units_of_images

__all__ = [
    "CONTENT_BYTES",
    "PART_IMAGES",
    "Examples",
    "Made",
    "Makers",
    "TokenFolder",
    "Tokenize",
    "Unit",
    "UnitFacts",
    "makers_of",
    "units_of",
    "units_of_images",
]
