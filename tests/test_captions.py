"""Captioned folders: what is read from them, and which captions are true of which pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from knn_diffusion.errors import UsageError
from knn_diffusion.training.captions import Captioned, caption_table, read_captioned


def folder_of(folder: Path, *entries: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "captions.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return folder


def picture(*captions: str, **facts: Any) -> Captioned:
    return Captioned(Path("x.png"), captions, **facts)


def true_of(pictures: list[Captioned]) -> list[set[str]]:
    """The captions that are true of each picture."""
    table = caption_table(pictures)
    held = table.holds(np.arange(len(pictures)), np.arange(len(table.texts)))
    return [{text for text, true in zip(table.texts, row, strict=True) if true} for row in held]


def test_a_line_gives_one_caption_or_several_and_what_else_is_known(tmp_path: Path) -> None:
    entries = (
        {"file": "a.png", "caption": "a cat"},
        {
            "file": "b.png",
            "captions": ["dog", "a brown dog"],
            "family": "noto",
            "facts": ["shows:dog", "tint:brown:dog"],
            "caption_facts": [["shows:dog"], ["tint:brown:dog"]],
            "artist": "somebody",
        },
    )
    cat, dog = read_captioned([folder_of(tmp_path, *entries)])
    assert (cat.file, cat.captions, cat.family, cat.facts) == (tmp_path / "a.png", ("a cat",), "", None)
    assert (dog.captions, dog.family) == (("dog", "a brown dog"), "noto")
    assert dog.facts == {"shows:dog", "tint:brown:dog"}
    assert dog.claims == (("shows:dog",), ("tint:brown:dog",))


def test_names_of_files_can_be_captions_and_subfolders_families(tmp_path: Path) -> None:
    for name in ("red-panda_02.png", "ink/Blue heart.png", "ink/007.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    found = read_captioned([tmp_path], from_names=True)
    assert {(one.captions[0], one.family) for one in found} == {
        ("red panda", ""),
        ("Blue heart", "ink"),
        ("007", "ink"),
    }


def test_a_captions_file_goes_before_the_names_of_files(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"file": "a.png", "caption": "a cat"})
    assert [one.captions for one in read_captioned([folder], from_names=True)] == [("a cat",)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "expected a folder with captions.jsonl.*--set captions_from_names=true"),
        ("", "has none: add lines"),
        ('{"file": "a.png"}\n', "in line 1 of"),
        ('{"file": "a.png", "captions": []}\n', "in line 1 of"),
        ('{"file": "a.png", "captions": "cat"}\n', "in line 1 of"),
        ('{"file": "a.png", "caption": "cat", "caption_facts": [[], []]}\n', "in line 1 of"),
        ("[1]\n", "in line 1 of"),
    ],
)
def test_a_folder_without_usable_captions_is_refused(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "captions.jsonl").write_text(content)
    with pytest.raises(UsageError, match=message):
        read_captioned([tmp_path])


def test_pictures_with_the_same_plainest_caption_show_the_same() -> None:
    table = caption_table([picture("cat", "a cat"), picture("dog"), picture("cat", "kitty")])
    assert table.groups.tolist() == [0, 1, 0]
    assert table.weights.tolist() == [2, 0, 1, 0]


def test_without_facts_a_caption_is_true_of_all_pictures_that_show_the_same() -> None:
    cat, dog, other_cat = true_of([picture("cat", "a cat"), picture("dog", "pet"), picture("cat", "kitty")])
    assert cat == other_cat == {"cat", "a cat", "kitty"}
    assert dog == {"dog", "pet"}


def test_a_shared_caption_is_true_of_both() -> None:
    assert true_of([picture("cat", "pet"), picture("dog", "pet")]) == [{"cat", "pet"}, {"dog", "pet"}]


def test_with_facts_a_caption_is_true_where_all_that_it_claims_holds() -> None:
    plain = picture("octopus", facts=frozenset({"shows:octopus", "shows:animal"}), claims=(("shows:octopus",),))
    purple = picture(
        "purple octopus",
        facts=frozenset({"shows:octopus", "shows:animal", "tint:purple:octopus"}),
        claims=(("tint:purple:octopus",),),
    )
    cat = picture(
        "cat", "animal", facts=frozenset({"shows:cat", "shows:animal"}), claims=(("shows:cat",), ("shows:animal",))
    )
    assert true_of([plain, purple, cat]) == [
        {"octopus", "animal"},
        {"octopus", "animal", "purple octopus"},
        {"cat", "animal"},
    ]


def test_a_picture_without_facts_shares_what_is_claimed_of_the_same() -> None:
    told = picture(
        "cat", "kitty", facts=frozenset({"shows:cat", "shows:kitty"}), claims=(("shows:cat",), ("shows:kitty",))
    )
    assert true_of([told, picture("cat", "cat icon"), picture("dog")])[1] == {"cat", "kitty", "cat icon"}


@pytest.mark.parametrize(
    ("caption", "may_mirror", "may_fade"),
    [
        ("cat", True, True),
        ("a cat to the left of a dog", False, True),
        ("clockwise arrows", False, True),
        ("a leftover pizza", True, True),
        ("Blue heart", True, False),
        ("a grey cat", True, False),
        ("a redwood tree", True, True),
    ],
)
def test_sides_and_colours_in_words_forbid_what_would_belie_them(
    caption: str, may_mirror: bool, may_fade: bool
) -> None:
    one = picture("thing", caption)
    assert (one.may_mirror, one.may_fade) == (may_mirror, may_fade)


def test_the_digest_names_captions_and_who_has_them() -> None:
    cats, dogs = picture("cat", "pet"), picture("dog", "pet")
    digests = {caption_table(some).digest() for some in ([cats, dogs], [dogs, cats], [cats], [picture("cat"), dogs])}
    assert len(digests) == 4
    assert caption_table([cats, dogs]).digest() == caption_table([cats, dogs]).digest()
