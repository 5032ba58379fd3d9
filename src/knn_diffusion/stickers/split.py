"""Makes `data/stickers_split.json`: which emoji are concepts, what they are called, which are held out.

Runs once per release of the font or of the `emoji` package; everything else reads the file. The draw is seeded, so the
same font and package give the same file.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from knn_diffusion.errors import MissingDependencyError, UsageError
from knn_diffusion.stickers.glyphs import FontGlyphs
from knn_diffusion.stickers.scenes import OWN_COLOUR, TINTS

HELD_OUT_SHARE = 0.1
LARGEST_FAMILY = 4
SAME_LOOK = 0.22
PAIR_COUNT = 60
SKIN_TONES = range(0x1F3FB, 0x1F400)
FLAG_LETTERS = range(0x1F1E6, 0x1F200)
TAG_END = 0xE007F

ALIASES = {
    "automobile": "car", "oncoming automobile": "oncoming car", "sport utility vehicle": "off-road car",
    "red apple": "apple", "articulated lorry": "truck", "delivery truck": "delivery van", "red paper lantern": "paper lantern",
    "lady beetle": "ladybug", "poultry leg": "chicken leg", "cut of meat": "steak", "hot beverage": "cup of coffee",
    "teacup without handle": "cup of green tea", "cup with straw": "soft drink", "spouting whale": "whale spouting water",
    "high voltage": "lightning bolt", "police car light": "siren", "game die": "dice", "pool 8 ball": "billiard ball",
    "wrapped gift": "gift box", "pile of poo": "poo", "moai": "stone head statue", "steaming bowl": "bowl of noodles",
    "shallow pan of food": "paella", "pot of food": "stew", "oden": "food on a skewer", "dango": "dumplings on a skewer",
    "tangerine": "orange fruit", "ewe": "sheep", "postbox": "mailbox", "water wave": "ocean wave", "mantelpiece clock": "old clock",
    "thong sandal": "flip-flop", "billed cap": "baseball cap", "headphone": "headphones", "flying disc": "frisbee",
    "magnifying glass tilted left": "magnifying glass", "wastebasket": "trash can", "fuel pump": "gas pump",
    "adhesive bandage": "bandage", "deciduous tree": "tree", "evergreen tree": "pine tree", "seedling": "sprout",
    "droplet": "drop of water", "herb": "green herb", "sauropod": "long-necked dinosaur", "t-rex": "tyrannosaurus",
    "ring buoy": "life ring", "lotion bottle": "bottle of lotion", "television": "television set",
    "nazar amulet": "blue eye amulet", "anatomical heart": "human heart", "brain": "human brain", "horse racing": "jockey on a horse",
    "takeout box": "takeaway box",
    "cloud with lightning": "thundercloud", "cloud with rain": "rain cloud", "cloud with snow": "snow cloud",
    "sun with face": "smiling sun", "full moon face": "smiling full moon", "input latin letters": "letters abc",
    "chequered flag": "checkered flag",
    "military medal": "medal with ribbon", "three o’clock": "clock",
    "heavy dollar sign": "dollar sign", "heavy equals sign": "equals sign", "person bouncing ball": "person dribbling a ball",
    "part alternation mark": "yellow zigzag mark", "page facing up": "sheet of paper", "page with curl": "curled sheet of paper",
    "flower playing cards": "japanese playing card", "mahjong red dragon": "mahjong tile", "joker": "joker card",
    "moon viewing ceremony": "moon-viewing table", "pine decoration": "bamboo decoration", "tanabata tree": "wish tree",
    "carp streamer": "fish streamers", "wind chime": "glass wind chime", "fish cake with swirl": "swirl fish cake",
    "collision": "explosion", "dashing away": "puff of smoke", "zzz": "sleeping zs", "artist palette": "paint palette",
    "control knobs": "mixing knobs", "level slider": "fader slider", "computer disk": "minidisc", "optical disk": "compact disc",
    "trackball": "trackball mouse", "videocassette": "video tape", "rescue worker’s helmet": "rescue helmet",
    "man’s shoe": "leather shoe", "woman’s boot": "tall boot", "woman’s clothes": "blouse", "woman’s hat": "sun hat",
    "woman’s sandal": "high-heeled sandal", "flat shoe": "ballet flat", "white flower": "flower stamp", "rosette": "award rosette",
    "building construction": "construction site with crane", "front-facing baby chick": "chick seen from the front",
    "bust in silhouette": "person silhouette", "busts in silhouette": "two people silhouettes", "no one under eighteen": "adults-only sign",
    "mx claus": "beardless santa", "mrs. claus": "mother christmas", "leftwards hand": "sideways hand",
    "leftwards pushing hand": "pushing hand", "left-facing fist": "sideways fist", "left speech bubble": "speech bubble",
    "right anger bubble": "anger bubble", "hourglass not done": "running hourglass", "hourglass done": "hourglass",
    "globe showing americas": "globe with america", "globe showing europe-africa": "globe with africa",
    "globe showing asia-australia": "globe with asia", "family": "family silhouettes", "bullseye": "dartboard",
    "latin cross": "cross", "piñata": "pinata", "first quarter moon face": "half moon face", "1st place medal": "gold medal",
    "2nd place medal": "silver medal", "3rd place medal": "bronze medal", "locked": "closed padlock",
    "unlocked": "open padlock", "locked with key": "padlock with key", "locked with pen": "padlock with pen",
    "tennis": "tennis ball", "badminton": "badminton racket", "ping pong": "ping-pong paddle", "lacrosse": "lacrosse stick",
    "field hockey": "field hockey stick", "ice hockey": "ice hockey stick", "cricket game": "cricket bat",
    "bowling": "bowling pins", "cooking": "fried egg in a pan", "construction": "construction barrier", "camping": "campsite",
    "dizzy": "dizzy star", "wedding": "wedding chapel", "ice": "ice cube", "video game": "game controller",
    "station": "train station", "technologist": "person at a laptop", "musical keyboard": "piano keyboard",
    "label": "price tag", "roll of paper": "roll of toilet paper", "file folder": "folder", "e-mail": "e-mail envelope",
    "performing arts": "theater masks", "breast-feeding": "mother nursing a child", "foggy": "foggy bridge",
    "desert island": "palm island", "hamsa": "hamsa hand", "kiss": "kissing couple", "mate": "mate drink",
    "chart increasing": "rising chart", "chart decreasing": "falling chart",
    "link": "chain link",
    "fire": "flame", "wood": "log of wood", "seat": "airplane seat",
    "diya lamp": "oil lamp", "selfie": "hand taking a selfie",
    "pouring liquid": "glass pouring liquid", "palms up together": "palms held up together", "ice cream": "bowl of ice cream",
    "rolling on the floor laughing": "face rolling with laughter", "speaker high volume": "speaker with high volume",
    "speaker low volume": "speaker with low volume", "speaker medium volume": "speaker with medium volume",
    "index pointing up": "finger pointing up", "index pointing at the viewer": "finger pointing at the viewer",
    "backhand index pointing up": "hand pointing up", "backhand index pointing down": "hand pointing down",
    "backhand index pointing left": "hand pointing sideways", "four leaf clover": "four-leaf clover",
    "milky way": "night sky with the milky way", "night with stars": "city at night with stars",
    "light rail": "light rail train", "airplane arrival": "airplane landing", "airplane departure": "airplane taking off",
    "bell with slash": "crossed-out bell", "call me hand": "call-me hand", "flag in hole": "golf flag in a hole",
    "person bald": "bald person", "person beard": "bearded person", "person blond hair": "person with blond hair",
    "person curly hair": "person with curly hair", "person red hair": "person with red hair",
    "person white hair": "person with white hair", "person taking bath": "person taking a bath",
    "gem stone": "diamond gemstone", "beverage box": "juice box", "tumbler glass": "glass of whisky",
    "mirror ball": "disco ball", "locomotive": "steam locomotive", "spiral shell": "seashell",
    "soft ice cream": "ice cream cone",
}  # fmt: skip

FOLD_INTO = {
    "magnifying glass tilted right": "magnifying glass tilted left", "right-facing fist": "left-facing fist",
    "rightwards hand": "leftwards hand", "rightwards pushing hand": "leftwards pushing hand",
    "backhand index pointing right": "backhand index pointing left", "merperson": "mermaid",
    "last quarter moon": "first quarter moon", "last quarter moon face": "first quarter moon face",
    "waning crescent moon": "waxing crescent moon", "waning gibbous moon": "waxing gibbous moon",
    "person beard": "man beard", "woman beard": "man beard", "pregnant man": "pregnant woman",
    "pregnant person": "pregnant woman", "woman and man holding hands": "people holding hands", "woman in motorized wheelchair": "person in motorized wheelchair",
}  # fmt: skip

FLAT_PATTERN = re.compile(
    r"\b(sign|button|keycap|arrow|arrows|square|circle|symbol|input|diamond|suit|triangle|asterisk|curly loop|"
    r"exclamation|question mark|no [a-z]+|dash|check mark|cross mark|restroom|room|prohibited|copyright|registered|"
    r"trade mark|information|wireless|mode|baggage|luggage sign|customs|passport|heart decoration|meridians)\b"
)
SOLID_NAMES = {
    "bow and arrow",
    "heart with arrow",
    "envelope with arrow",
    "mobile phone with arrow",
    "person in steamy room",
    "person in suit levitating",
    "sign of the horns",
}
FLAT_NAMES = {
    "aquarius", "aries", "cancer", "capricorn", "gemini", "leo", "libra", "ophiuchus", "pisces", "sagittarius", "scorpio",
    "taurus", "virgo", "plus", "minus", "multiply", "divide", "infinity", "peace symbol", "yin yang", "om", "khanda", "menorah",
    "latin cross", "orthodox cross", "star and crescent", "star of david", "wheel of dharma", "dotted six-pointed star",
    "eight-pointed star", "sparkle", "part alternation mark", "circled m", "currency exchange", "place of worship",
    "non-potable water", "potable water", "water closet", "left luggage", "no entry", "children crossing", "hundred points",
    "antenna bars", "radioactive", "biohazard", "hot springs", "cinema", "mobile phone off", "trident emblem", "fleur-de-lis",
    "elevator", "atm sign", "cyclone", "anger symbol", "japanese symbol for beginner", "chart increasing with yen",
    "diamond with a dot", "heart exclamation", "zzz", "warning",
}  # fmt: skip


SHAPE_WORD = re.compile(r"\b(heart|cloud|moon|star|wheelchair|mailbox|medal)s?\b")


def _named_emoji(glyphs: FontGlyphs) -> Iterator[tuple[str, str]]:
    """(char, plain name) of every emoji the font draws as one picture, without skin tones and national flags."""
    try:
        import emoji
    except ImportError:
        raise MissingDependencyError(
            "expected the package emoji to list the concepts, it is missing: pip install knn-diffusion[stickers]"
        ) from None
    for char, facts in sorted(emoji.EMOJI_DATA.items(), key=lambda item: (item[1]["en"], item[0])):
        points = [ord(point) for point in char]
        plain = not any(point in SKIN_TONES or point in FLAG_LETTERS or point == TAG_END for point in points)
        if (
            facts["status"] == emoji.STATUS["fully_qualified"]
            and plain
            and glyphs.is_one_glyph(char)
            and _has_ink(glyphs, char)
        ):
            yield char, facts["en"].strip(":").replace("_", " ").lower()


def _has_ink(glyphs: FontGlyphs, char: str) -> bool:
    try:
        return min(glyphs(char).size) > 1
    except UsageError:
        return False


def _folded(names: Iterable[str]) -> dict[str, str]:
    """Name -> the name that stands for it: one person for man, woman and person, one clock, no "facing right"."""
    known = set(names)

    def stands_for(name: str) -> str:
        name = FOLD_INTO.get(name.removesuffix(" facing right"), name.removesuffix(" facing right"))
        if name.endswith((" o’clock", "-thirty")):
            return "three o’clock"
        for opening in ("family ", "kiss ", "couple with heart "):
            if name.startswith(opening) and name != "kiss mark":
                return opening.strip()
        gendered = re.match(r"(man|woman|men|women) (.+)", name)
        if gendered:
            rest = gendered[2]
            neutral = [other for other in (f"person {rest}", f"people {rest}", rest, f"deaf {rest}") if other in known]
            return neutral[0] if neutral else name
        deaf = re.match(r"deaf (man|woman)", name)
        return "deaf person" if deaf else name

    return {name: stands_for(name) for name in known}


def _is_flat(name: str) -> bool:
    return name in FLAT_NAMES or (bool(FLAT_PATTERN.search(name)) and name not in SOLID_NAMES)


def _look(glyph: Image.Image, side: int = 24) -> np.ndarray:
    """Lightness and ink of a glyph centred in a square, [2, side * side]; without colour, so a blue heart is a heart."""
    cell = Image.new("RGBA", (max(glyph.size),) * 2, (0, 0, 0, 0))
    cell.paste(glyph, ((cell.width - glyph.width) // 2, (cell.height - glyph.height) // 2))
    small = cell.resize((side, side), Image.Resampling.BOX)
    light, ink = np.asarray(small.convert("LA"), np.float32).reshape(-1, 2).T / 255
    return np.stack([light * ink, ink])


def _families(glyphs: FontGlyphs, chars: list[str], names: list[str]) -> list[set[int]]:
    """Groups of glyphs that look alike, directly or through others, mirrored or not, or that share a word for a shape."""
    looks = np.stack([_look(glyphs(char)) for char in chars])
    mirrored = np.stack([_look(glyphs(char).transpose(Image.Transpose.FLIP_LEFT_RIGHT)) for char in chars])
    shapes = [match[1] if (match := SHAPE_WORD.search(name)) else None for name in names]
    families = [{number} for number in range(len(chars))]
    for number in range(len(chars)):
        for table in (looks, mirrored):
            either = np.maximum(table[:, 1], looks[number, 1]).sum(axis=1)
            distance = np.abs(table - looks[number]).sum(axis=(1, 2)) / either
            akin = [other for other in range(number) if shapes[other] and shapes[other] == shapes[number]]
            for other in [*np.flatnonzero(distance < SAME_LOOK), *akin[:1]]:
                if families[other] is not families[number]:
                    families[number] |= families[other]
                    for member in families[number]:
                        families[member] = families[number]
    return families


def _draw_held_out(
    families: list[set[int]], eligible: list[int], forced: int, count: int, rng: random.Random
) -> set[int]:
    """Whole families at a time, since a glyph whose twin is trained on is not unseen; big families stay in training."""
    chosen = set(families[forced])
    for number in rng.sample(eligible, len(eligible)):
        family = families[number]
        if len(chosen) + len(family - chosen) <= count and len(family) <= LARGEST_FAMILY and family <= set(eligible):
            chosen |= family
    return chosen


def build_split(glyphs: FontGlyphs, seed: int = 0) -> dict[str, Any]:
    """The content of the split file: concepts with their flags, and the held-out pairs.

    A tenth of the concepts that are not flat is held out, families of look-alikes together, pineapple always among them;
    the held-out pairs join a tint with a training concept (half of them teal), and teal with pineapple.
    """
    named = {name: char for char, name in _named_emoji(glyphs)}
    kept = sorted({stand_in for stand_in in _folded(named).values() if stand_in in named})
    chars = [named[name] for name in kept]
    flat = [_is_flat(name) for name in kept]
    names = [ALIASES.get(name, name).replace("’", "'") for name in kept]
    rng = random.Random(seed)
    solid = [number for number in range(len(kept)) if not flat[number]]
    pineapple = names.index("pineapple")
    held_out = _draw_held_out(_families(glyphs, chars, kept), solid, pineapple, round(HELD_OUT_SHARE * len(solid)), rng)
    tintable = [
        names[number] for number in solid if number not in held_out and names[number].split()[0] not in OWN_COLOUR
    ]
    partners = rng.sample(tintable, PAIR_COUNT)
    others = [tint for tint in TINTS if tint != "teal"]
    tints = ["teal" if place % 2 else rng.choice(others) for place in range(PAIR_COUNT)]
    return {
        "concepts": [
            {"char": char, "name": name, "flat": flat[number], "held_out": number in held_out}
            for number, (char, name) in enumerate(zip(chars, names, strict=True))
        ],
        "held_out_pairs": [
            ["teal", "pineapple"],
            *sorted([tint, name] for tint, name in zip(tints, partners, strict=True)),
        ],
    }


def split_text(content: dict[str, Any]) -> str:
    """The split as the text of its file: JSON with one entry a line, so that changes can be read."""
    lists = [
        f'"{name}": [\n' + ",\n".join("  " + json.dumps(entry, ensure_ascii=False) for entry in entries) + "\n]"
        for name, entries in content.items()
    ]
    return "{" + ",\n".join(lists) + "}\n"
