"""`index compact`: removed images leave the disk."""

from __future__ import annotations

from collections.abc import Iterator

from knn_diffusion.cli.index import IndexArgument
from knn_diffusion.cli.terminal import JsonOption, answer, progress


def compact(index: IndexArgument, *, as_json: JsonOption = False) -> None:
    """Take removed images off the disk and make many small segments few; the index can be used meanwhile.

    Example: knn-diffusion index compact my-index
    """
    from knn_diffusion.image_index import ImageIndex

    with ImageIndex.open(index) as opened, progress() as show:
        before = opened.compact(progress=show)
        after = opened.waste()
    result = {
        "count": after.rows - after.removed,
        "removed": before.removed - after.removed,
        "bytes_freed": before.bytes_freed,
        "segments": after.segments,
    }

    def lines() -> Iterator[str]:
        yield f"{result['removed']:,} removed images and at least {result['bytes_freed']:,} bytes left the disk"
        yield f"{result['count']:,} images in {result['segments']:,} files of vectors"

    answer(result, as_json, lines)
