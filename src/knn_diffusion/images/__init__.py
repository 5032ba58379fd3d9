"""Images in and out: any file to upright RGB or RGBA, the one rule of framing, arrays and pixels, search for files; stickers as files with settings."""

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
from knn_diffusion.images.new_files import NumberedFiles, add_file
from knn_diffusion.images.resize import resized
from knn_diffusion.images.save import FileFormat, check_format, encode, parameters_text, png, read_settings, save_png
from knn_diffusion.images.sheet import grid
from knn_diffusion.images.sticker import OPAQUE, Finish, Finishing, check_finish, finished
from knn_diffusion.images.tracing import require_tracing, traced

__all__ = [
    "FRAMING",
    "MAX_PIXELS",
    "OF_SEVERAL",
    "OPAQUE",
    "Colour",
    "FileFormat",
    "Finish",
    "Finishing",
    "ImageFile",
    "NumberedFiles",
    "SourceImage",
    "add_file",
    "averages",
    "check_finish",
    "check_format",
    "encode",
    "find_files",
    "find_images",
    "finished",
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
    "png",
    "read_settings",
    "require_tracing",
    "resized",
    "save_png",
    "showing_ground",
    "square",
    "subject",
    "to_array",
    "traced",
    "uint8_from_pixels",
]
