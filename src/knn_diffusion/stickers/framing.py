"""How a sticker fills its frame."""

from __future__ import annotations

from PIL import Image


def frame(image: Image.Image, size: int) -> Image.Image:
    """The picture (RGBA) trimmed to what is seen, its longer side at 15/16 of `size`, in the middle of a square."""
    box = image.getchannel("A").point(lambda level: 255 if level > 8 else 0).getbbox()
    subject = image.crop(box)
    scale = max(1, round(size * 15 / 16)) / max(subject.size)
    width, height = max(1, round(subject.width * scale)), max(1, round(subject.height * scale))
    if subject.size != (width, height):
        subject = (
            subject.convert("RGBa").resize((width, height), Image.Resampling.HAMMING, reducing_gap=3.0).convert("RGBA")
        )
        subject.putalpha(subject.getchannel("A").point(lambda level: level if level > 8 else 0))
    framed = Image.new("RGBA", (size, size))
    framed.paste(subject, ((size - width) // 2, (size - height) // 2))
    return framed
