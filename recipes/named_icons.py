"""Further named pictures for the joint encoder alone: sets of icons with plain names. They teach it words that no emoji has.

    python recipes/named_icons.py PACKAGES runs/icons

`npm pack` brings each package at its exact version into PACKAGES, unless it is there. The folder gets pictures of 160 pixels and `captions.jsonl`.
Icons of one colour are drawn in a random one. Everyday words, and names of concepts that the encoder must not know, stay out.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fetch_art import fetch

from knn_diffusion import stickers
from knn_diffusion.checkpoint import atomic_write_bytes
from knn_diffusion.stickers.icons import Icon, read_package, render_svg
from knn_diffusion.stickers.vocabulary import vocabulary

SIDE = 160
PLAIN_COLOURS = ("#000", "#222", "#333", "#fff", "#fff")
UNNAMED = re.compile(
    r"skin|flag|keycap|button|o-clock|thirty|letter|medium|^u[0-9a-f]{3}|regional|input-|arrow-(up|down)|caret|logo|"
    r"^text-|number-|chart|align|file-|^\d+$"
)
"""Icons whose names say too little of what they show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IconSet:
    """A package of icons: `only` those whose names match; `joined` when its names have no separators."""

    name: str
    version: str
    sha256: str
    licence: str
    only: str = ""
    joined: bool = False


SETS = (
    IconSet(name="game-icons", version="1.2.4", licence="CC-BY-3.0", sha256="f5758efb34d91c4f50b941f355f16ee73938625e5996fabc25171288404460a4"),
    IconSet(name="fluent-emoji-high-contrast", version="1.2.6", licence="MIT", sha256="0b92d48c90d2200bd499e3cdd09a127ca6a8c8ddefd34c35eb5a1e4994012ae0"),
    IconSet(name="fxemoji", version="1.2.2", licence="Apache-2.0", joined=True, sha256="f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef"),
    IconSet(name="streamline-emojis", version="1.2.4", licence="CC-BY-4.0", sha256="5dac87c876b322500989828c5823143e0100d78881627a2e4081a4b897cbfdbc"),
    IconSet(name="streamline-kameleon-color", version="1.2.2", licence="CC-BY-4.0", sha256="5f972d986afb340d8a45d7a16e767f99f91fdd94db53e46a78c79847212aed7b"),
    IconSet(name="streamline-ultimate-color", version="1.2.2", licence="CC-BY-4.0", sha256="46133a11f3734bcef29066391d7edc141ed1d8056242ddfa1b5d36ce286420b6"),
    IconSet(name="flat-color-icons", version="1.2.3", licence="MIT", sha256="d8878a9b0f02d749bc8671eb7d47882eb711185cbcefbb365cbfb488773c4786"),
    IconSet(name="temaki", version="1.2.6", licence="CC0-1.0", sha256="24a874e1d81a7de9d56e534fdc56287cfe6e73488a24ef5c8982d4fd5f294d8d"),
    IconSet(name="healthicons", version="1.2.13", licence="MIT", only=r"^(?!.*(outline|negative|24px))", sha256="4c2552c45737788a6599da3c5b72610c7fb4e7f87075d401c56fa16d487d4caf"),
    IconSet(name="ph", version="1.2.2", licence="MIT", only=r"-fill$", sha256="e3a582a047d9829fc7e8842c660d8065e598d1b68bb58cb68e75a1f1e5a614cc"),
)  # fmt: skip


def caption(icon: str, chosen: IconSet) -> str:
    """What an icon shows, "" when its name does not say it: "red panda" for red-panda-2."""
    if chosen.joined:
        return next((one.name for one in vocabulary() if re.sub(r"[ -]", "", one.name) == icon), "")
    words = re.sub(r"-(fill|24px|duo|alternate)$", "", icon)
    words = re.sub(r"(?<=\D)-?\d+$", "", words).replace("-", " ").strip().lower()
    return words if len(words) > 2 else ""


def kept_out() -> tuple[re.Pattern[str], set[str]]:
    """Names that no caption may hold, and words that none may be: what the encoder is measured by."""
    unnamed = [one for one in vocabulary() if one.unnamed]
    names = "|".join(re.escape(one.name) for one in unnamed)
    words = {word for one in unnamed for word in one.synonyms} | set(stickers.everyday_words())
    return re.compile(rf"\b({names})s?\b"), words


def draw(icon: Icon, chosen: IconSet, coloured: bool, file: Path) -> None:
    """Draw an icon, in a colour that follows from its name where it has none."""
    rng = random.Random(f"{chosen.name} {icon.name}")
    colour = rng.choice([*PLAIN_COLOURS, *(f"#{rng.randrange(2**24):06x}" for _ in range(5))])
    render_svg(icon.svg.replace("currentColor", "#222" if coloured else colour), SIDE).save(file)


def entries(chosen: IconSet, package: Path, folder: Path) -> Iterator[dict[str, object]]:
    """The lines of `captions.jsonl` for a set, each with its picture drawn."""
    info = json.loads((package / "info.json").read_text(encoding="utf-8"))
    if info["license"]["spdx"] != chosen.licence:
        sys.exit(f"expected {chosen.name} under {chosen.licence}, its info.json says {info['license']['spdx']}")
    names, words = kept_out()
    (folder / chosen.name).mkdir(parents=True, exist_ok=True)
    for icon in read_package(package).values():
        text = caption(icon.name, chosen)
        if UNNAMED.search(icon.name) or not re.search(chosen.only, icon.name) or not text:
            continue
        if names.search(text) or text in words:
            continue
        file = f"{chosen.name}/{icon.name}.png"
        if not (folder / file).exists():
            draw(icon, chosen, bool(info.get("palette")), folder / file)
        yield {"file": file, "captions": [text, stickers.with_article(text), f"{text} icon"], "family": chosen.name}


def main() -> None:
    """Fetch, draw and caption every set."""
    packages, folder = map(Path, sys.argv[1:])
    lines = []
    for chosen in SETS:
        package = fetch(f"@iconify-json/{chosen.name}", chosen.version, chosen.sha256, packages)
        lines += [json.dumps(entry) + "\n" for entry in entries(chosen, package, folder)]
    atomic_write_bytes(folder / "captions.jsonl", "".join(lines).encode())


if __name__ == "__main__":
    main()
