"""Fetch the sticker families and draw them: the one step of the recipes that needs a network.

python recipes/fetch_art.py PACKAGES ART [--processes 2]

`npm pack` brings each package at its exact version into PACKAGES, unless it is there; its SHA-256 must be the recorded
one. ART gets `FAMILY/ICON.png` for every icon of the vocabulary, `FAMILY/info.json` with author and licence, and
`ATTRIBUTION.md` that names them all. Drawing goes on where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from knn_diffusion.stickers.families import FAMILIES, Family
from knn_diffusion.stickers.icons import read_package, render_package
from knn_diffusion.stickers.vocabulary import vocabulary

WORDS = ("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a")
"""Names and keywords of emoji, read by sticker_vocabulary.py."""


def fetch(package: str, version: str, sha256: str, folder: Path) -> Path:
    """The unpacked npm package, fetched if it is not there. Raises: SystemExit when its content is another."""
    stem = f"{package.removeprefix('@').replace('/', '-')}-{version}"
    place, archive = folder / stem, folder / f"{stem}.tgz"
    if place.is_dir():
        return place
    if not archive.exists():
        subprocess.run(
            ["npm", "pack", "--loglevel=error", f"{package}@{version}", "--pack-destination", str(folder)], check=True
        )
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        sys.exit(f"expected {archive} with SHA-256 {sha256}, got {found}: delete it and fetch again")
    with tempfile.TemporaryDirectory(dir=folder) as unfinished, tarfile.open(archive) as content:
        content.extractall(unfinished, filter="data")
        (Path(unfinished) / "package").rename(place)
    return place


def draw(family: Family, package: Path, art: Path, processes: int) -> str:
    """Draw the family's icons that the vocabulary names; a line of the attribution."""
    icons = read_package(package)
    names = {name for concept in vocabulary() if (name := concept.icon_in(family.name)) in icons}
    render_package(package, art / family.name, sorted(names), processes=processes)
    info = json.loads((package / "info.json").read_text(encoding="utf-8"))
    if info["license"]["spdx"] != family.licence:
        sys.exit(f"expected {family.name} under {family.licence}, its info.json says {info['license']['spdx']}")
    return (
        f"- `{family.name}`: {info['name']} by {family.credit}, {info['author']['url']}, "
        f"licence {family.licence} ({info['license']['url']}); drawn from {family.package} {family.version}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    parser.add_argument("art", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--only-fetch", action="store_true", help="draw nothing")
    options = parser.parse_args()
    options.packages.mkdir(parents=True, exist_ok=True)
    fetch(*WORDS, options.packages)
    packages = {family: fetch(family.package, family.version, family.sha256, options.packages) for family in FAMILIES}
    if not options.only_fetch:
        lines = [draw(family, package, options.art, options.processes) for family, package in packages.items()]
        (options.art / "ATTRIBUTION.md").write_text("# Sticker art\n\n" + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
