"""Images in and out: any file to upright RGB, the one resize, arrays and pixels, search for files, PNG with settings."""

from knn_diffusion.images.arrays import averages, from_array, pixels_from_uint8, square, to_array, uint8_from_pixels
from knn_diffusion.images.decode import MAX_PIXELS, open_image
from knn_diffusion.images.find import SourceImage, find_images
from knn_diffusion.images.save import grid, parameters_text, read_settings, save_png

__all__ = [
    "MAX_PIXELS",
    "SourceImage",
    "averages",
    "find_images",
    "from_array",
    "grid",
    "open_image",
    "parameters_text",
    "pixels_from_uint8",
    "read_settings",
    "save_png",
    "square",
    "to_array",
    "uint8_from_pixels",
]
