"""Images in and out: any file to upright RGB or RGBA, the one rule of framing, arrays and pixels, search for files, PNG with settings."""

from knn_diffusion.images.arrays import (
    from_array,
    network_input,
    over_ground,
    pixels_from_uint8,
    to_array,
    uint8_from_pixels,
)
from knn_diffusion.images.decode import MAX_PIXELS, OF_SEVERAL, is_transparent, open_image
from knn_diffusion.images.find import ImageFile, SourceImage, find_files, find_images, is_container
from knn_diffusion.images.framing import (
    FRAMING,
    Colour,
    averages,
    frame,
    longer_side,
    on_ground,
    showing_ground,
    square,
    subject,
)
from knn_diffusion.images.save import grid, parameters_text, read_settings, save_png

__all__ = [
    "FRAMING",
    "MAX_PIXELS",
    "OF_SEVERAL",
    "Colour",
    "ImageFile",
    "SourceImage",
    "averages",
    "find_files",
    "find_images",
    "frame",
    "from_array",
    "grid",
    "is_container",
    "is_transparent",
    "longer_side",
    "network_input",
    "on_ground",
    "open_image",
    "over_ground",
    "parameters_text",
    "pixels_from_uint8",
    "read_settings",
    "save_png",
    "showing_ground",
    "square",
    "subject",
    "to_array",
    "uint8_from_pixels",
]
