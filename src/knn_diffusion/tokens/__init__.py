"""Training examples of the denoiser on disk: tokens and embedding of every image, made once, shard by shard."""

from knn_diffusion.tokens.parts import CONTENT_BYTES, Examples, Made, Makers, TokenFolder
from knn_diffusion.tokens.tokenize import Tokenize, makers_of
from knn_diffusion.tokens.units import Unit, units_of

__all__ = ["CONTENT_BYTES", "Examples", "Made", "Makers", "TokenFolder", "Tokenize", "Unit", "makers_of", "units_of"]
