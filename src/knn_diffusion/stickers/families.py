"""The sticker families: who drew them, where their art comes from, and what each is for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One set of stickers by the same hand.

    name: the icon set, also the folder of its art; version and sha256: of the npm package `@iconify-json/NAME`;
    licence: SPDX name; credit: who must be named; role: trained on, or only tested on; bundled: part of the index
    that ships with the package.
    """

    name: str
    version: str
    sha256: str
    licence: str
    credit: str
    role: Literal["train", "test"] = "train"
    bundled: bool = False

    @property
    def package(self) -> str:
        """Name of the npm package."""
        return f"@iconify-json/{self.name}"


FAMILIES = (
    Family(
        name="noto", version="1.2.9", licence="Apache-2.0", credit="Google (Noto Emoji)", bundled=True,
        sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    Family(
        name="fluent-emoji-flat", version="1.2.6", licence="MIT", credit="Microsoft (Fluent Emoji)", bundled=True,
        sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    ),
    Family(
        name="twemoji", version="1.2.5", licence="CC-BY-4.0", credit="Twitter and contributors (Twemoji)", bundled=True,
        sha256="19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
    ),
    Family(
        name="emojione", version="1.2.3", licence="CC-BY-4.0", credit="EmojiOne and EmojiTwo",
        sha256="26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
    ),
    Family(
        name="noto-v1", version="1.2.5", licence="Apache-2.0", credit="Google (Noto Emoji, first design)",
        sha256="2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37",
    ),
    Family(
        name="fluent-emoji", version="1.2.7", licence="MIT", credit="Microsoft (Fluent Emoji)",
        sha256="8044210dbf11e016d4de85f15d01a243423bd832457e7e2491df1b751c0e272b",
    ),
    Family(
        name="openmoji", version="1.2.29", licence="CC-BY-SA-4.0", credit="OpenMoji, HfG Schwäbisch Gmünd", role="test",
        sha256="03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
    ),
)  # fmt: skip
TRAINED = tuple(family.name for family in FAMILIES if family.role == "train")
BUNDLED = tuple(family.name for family in FAMILIES if family.bundled)
HELD_OUT_FAMILY = next(family.name for family in FAMILIES if family.role == "test")
