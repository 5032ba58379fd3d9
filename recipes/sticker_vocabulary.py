"""Refresh `data/sticker_vocabulary.json`: names, art, synonyms and split of the sticker world's concepts.

python recipes/sticker_vocabulary.py PACKAGES

PACKAGES is the folder that `recipes/fetch_art.py` fills. Names are curated in the file itself; this fills in which icon
of each family shows a concept, the synonyms of emojibase, and the split. A concept keeps the side of the split it is on;
a new one falls to a side by the hash of its name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from knn_diffusion.stickers.concepts import everyday_words
from knn_diffusion.stickers.families import FAMILIES, TRAINED
from knn_diffusion.stickers.icons import read_package
from knn_diffusion.stickers.tints import TINTS

DATA = Path(__file__).parents[1] / "src" / "knn_diffusion" / "data"
PLACE = DATA / "sticker_vocabulary.json"
PEOPLE = 1
"""The group of people and body parts in emojibase."""
HELD_OUT_SHARE, UNNAMED_SHARE, VALIDATION_SHARE = 0.10, 0.06, 0.20
RARE_WORD = 4
"""A synonym of fewer concepts than this is particular: one of an unnamed concept stands in no caption at all."""
VARIATION = re.compile("[\ufe0e\ufe0f]")
NOT_A_STICKER = re.compile(
    r"button|keycap|arrow|square|circle\b|input|letters abc|copyright|registered|trade mark|information|circled m|"
    r"japanese (?!castle|dolls|post|playing)|curly loop|wavy dash|minus|multiply|plus|divide|equals|zigzag|diamond with|"
    r"(?:small|large) (?:blue|orange) diamond|white (?:question|exclamation)|exclamation question|(?:fe)?male sign|"
    r"room$|restroom|water closet|wireless|mode$|customs|claim|passport|left luggage|antenna bars|cinema|atm sign|"
    r"chart increasing with yen|currency exchange|triangle pointed|meridians|place of worship|dollar sign|"
    r"aquarius|aries|cancer|capricorn|gemini|leo$|libra|ophiuchus|pisces|sagittarius|scorpio|taurus|virgo|symbol$"
)
STILL_A_STICKER = {"atom symbol", "peace symbol", "recycling symbol", "anger symbol"}
NO_SYNONYM = {"zodiac", "where", "gray", "gold", "silver", *TINTS}
STAY_NAMED = {
    "candle", "cherries", "coin", "dice", "explosion", "giraffe", "headphones", "hospital", "ninja", "party popper", "pear",
    "pie", "pizza", "popcorn", "rainbow", "rose", "sandwich", "shark", "strawberry", "unicorn", "watermelon",
}  # fmt: skip
"""Words that people try first, so that the test of unnamed words costs the bundled model little."""
ORDER = ("name", "char", "flat", "person", "held_out", "unnamed", "validation", "icon", "other_icons", "synonyms")
SMALL_WORDS = {"a", "an", "and", "at", "in", "of", "on", "the", "with", "for", "from", "to"}


def key(emoji: str) -> str:
    """The emoji without variation selectors, as its code points."""
    return "-".join(f"{ord(point):x}" for point in VARIATION.sub("", emoji))


def words(text: str) -> set[str]:
    """The words of a phrase that carry meaning, plurals cut."""
    found = re.findall(r"[^\W\d_]+", text.lower())
    return {re.sub(r"(?<=[^s])s$", "", word) for word in found} - SMALL_WORDS


def share(salt: str, name: str) -> float:
    """A number in [0, 1) that only the name decides."""
    return int.from_bytes(hashlib.sha256(f"{salt} {name}".encode()).digest()[:8], "big") / 2**64


def package(folder: Path, family: str, version: str) -> Path:
    """Where fetch_art.py unpacked a family."""
    return folder / f"iconify-json-{family}-{version}"


def slug(label: str) -> str:
    """A label as icon sets spell it."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower().replace("’", "").replace("ñ", "n")).strip("-")


def icons_by_emoji(folder: Path, labels: dict[str, str]) -> dict[str, dict[str, str]]:
    """For each family the icon of each emoji: by code points where the package knows them, else by name."""
    spellings: dict[str, str] = {}
    exact: dict[str, dict[str, str]] = {}
    content = {
        family.name: json.loads((package(folder, family.name, family.version) / "icons.json").read_text())
        for family in FAMILIES
    }
    for family in FAMILIES:
        chars = package(folder, family.name, family.version) / "chars.json"
        found = json.loads(chars.read_text()) if chars.exists() else {}
        aliases = content[family.name].get("aliases", {})
        for code, name in found.items():
            emoji = "-".join(part for part in code.lower().split("-") if part not in ("fe0e", "fe0f"))
            real = aliases[name]["parent"] if name in aliases and not set(aliases[name]) - {"parent"} else name
            if real in content[family.name]["icons"]:
                exact.setdefault(family.name, {}).setdefault(emoji, real)
            spellings.setdefault(name, emoji)
        for alias, entry in aliases.items():
            if entry["parent"] in spellings and set(entry) == {"parent"}:
                spellings.setdefault(alias, spellings[entry["parent"]])
    for emoji, label in labels.items():
        spellings.setdefault(slug(label), emoji)
    for family in FAMILIES:
        if family.name not in exact:
            icons, aliases = content[family.name]["icons"], content[family.name].get("aliases", {})
            by_name = exact.setdefault(family.name, {})
            for name in icons:
                if name in spellings:
                    by_name.setdefault(spellings[name], name)
            for alias, entry in aliases.items():
                if alias in spellings and set(entry) == {"parent"}:
                    by_name.setdefault(spellings[alias], entry["parent"])
    return exact


NEW_NAMES = {
    "1fae9": "face with bags under eyes", "1faea": "distorted face", "1faef": "fight cloud", "1fac8": "hairy creature",
    "1fac6": "fingerprint", "1facd": "orca", "1fabe": "leafless tree", "1fadc": "root vegetable", "1f6d8": "landslide",
    "1fa8a": "trombone", "1fa89": "harp", "1fa8e": "treasure chest", "1fa8f": "shovel", "1fadf": "splatter",
}  # fmt: skip


def synonyms_of(entry: dict[str, Any], name: str) -> list[str]:
    """Other words for the concept: the official label and the tags of emojibase, without numbers and short forms."""
    label = entry["label"].lower().replace("’", "'").replace(": ", " ")
    found = [label, *(tag.lower().replace("’", "'") for tag in entry.get("tags", []))]
    everyday = {word.removesuffix("s") for word in everyday_words()} | set(everyday_words())
    usable = [
        word
        for word in dict.fromkeys(found)
        if word != name and word not in NO_SYNONYM and re.fullmatch(r"[a-z][a-z' -]{2,}", word) and not words(word) & everyday
        and word.replace("-", " ") != name and len(set(word) & set("aeiouy")) > 0
    ]  # fmt: skip
    return usable


def previous() -> dict[str, Any]:
    """The vocabulary as it stands; before there was one, the concepts of the font's split."""
    place = PLACE if PLACE.exists() else DATA / "stickers_split.json"
    return json.loads(place.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def choose_unnamed(entries: list[dict[str, Any]], count: int) -> set[str]:
    """Concepts whose words nothing else is called by, in the order of their hashes."""
    uses = Counter(word for entry in entries for word in words(entry["name"]))
    everyday = {name for names in everyday_words().values() for name in names}
    able = [
        entry["name"]
        for entry in entries
        if not entry.get("flat") and not entry.get("held_out") and entry["name"] not in everyday | STAY_NAMED
        and len(words(entry["name"])) <= 2 and all(uses[word] == 1 for word in words(entry["name"]))
    ]  # fmt: skip
    return set(sorted(able, key=lambda name: share("unnamed", name))[:count])


def forbid_words_of_unnamed(entries: list[dict[str, Any]]) -> None:
    """Take from every concept's synonyms what would tell the name or a particular synonym of an unnamed one."""
    uses = Counter(word for entry in entries for word in entry["synonyms"])
    unnamed = [entry for entry in entries if entry.get("unnamed")]
    names = {word for entry in unnamed for word in words(entry["name"])}
    particular = {word for entry in unnamed for word in entry["synonyms"] if uses[word] < RARE_WORD}
    told = {word for entry in entries if not entry.get("unnamed") for word in words(entry["name"])}
    for entry in entries:
        if entry.get("unnamed"):
            entry["synonyms"] = [word for word in entry["synonyms"] if word in particular and not words(word) & told]
    particular = {word for entry in unnamed for word in entry["synonyms"]}
    for entry in entries:
        if not entry.get("unnamed"):
            entry["synonyms"] = [
                word for word in entry["synonyms"]
                if not words(word) & names and word not in particular and not any(words(other) <= words(word) for other in particular)
            ]  # fmt: skip


def build(folder: Path) -> dict[str, Any]:
    """The content of the vocabulary file."""
    data = json.loads((folder / "emojibase-data-17.0.0" / "en" / "data.json").read_text(encoding="utf-8"))
    known = {key(entry["emoji"]): entry for entry in data}
    icons = icons_by_emoji(folder, {emoji: entry["label"] for emoji, entry in known.items()})
    drawn = {family.name: set(read_package(package(folder, family.name, family.version))) for family in FAMILIES}
    old = previous()
    base = {key(entry["char"]): entry for entry in old["concepts"]}
    for emoji, name in NEW_NAMES.items():
        base.setdefault(
            emoji, {"char": known[emoji]["emoji"], "name": name, "held_out": share("held out", name) < HELD_OUT_SHARE}
        )
    entries = []
    for emoji, entry in base.items():
        name = entry["name"]
        if name not in STILL_A_STICKER and entry.get("flat") and NOT_A_STICKER.search(name):
            continue
        art = {family: icons[family][emoji] for family in icons if icons[family].get(emoji) in drawn[family]}
        if sum(family in art for family in TRAINED) < 2:
            print("left out, in fewer than two families:", name, art)
            continue
        common = Counter(art.values()).most_common(1)[0][0]
        other = {
            family.name: art.get(family.name) for family in FAMILIES
            if art.get(family.name) != common and (family.name in art or common in drawn[family.name])
        }  # fmt: skip
        flags = {
            "flat": entry.get("flat"), "person": known[emoji].get("group") == PEOPLE, "held_out": entry.get("held_out"),
            "unnamed": entry.get("unnamed"), "validation": share("validation", name) < VALIDATION_SHARE,
        }  # fmt: skip
        entries.append({
            "name": name, "char": entry["char"], **{flag: True for flag, raised in flags.items() if raised},
            "icon": common, **({"other_icons": other} if other else {}), "synonyms": synonyms_of(known[emoji], name),
        })  # fmt: skip
    entries.sort(key=lambda entry: entry["name"])
    if not any(entry.get("unnamed") for entry in entries):
        unnamed = choose_unnamed(entries, round(UNNAMED_SHARE * len(entries)))
        entries = [entry | {"unnamed": True} if entry["name"] in unnamed else entry for entry in entries]
    forbid_words_of_unnamed(entries)
    entries = [{key: entry[key] for key in ORDER if entry.get(key)} for entry in entries]
    names = {entry["name"] for entry in entries}
    return {"concepts": entries, "held_out_pairs": [pair for pair in old["held_out_pairs"] if pair[1] in names]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    content = build(parser.parse_args().packages)
    lists = [
        f'"{name}": [\n' + ",\n".join("  " + json.dumps(entry, ensure_ascii=False) for entry in entries) + "\n]"
        for name, entries in content.items()
    ]
    PLACE.write_text("{" + ",\n".join(lists) + "}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
