"""Transparent stickers of several families: what they show, how they look, what is said of them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sticker_art import FAMILIES, SHAPES, make_art, shape

from knn_diffusion.cli import main
from knn_diffusion.errors import UsageError
from knn_diffusion.stickers import everyday_words
from knn_diffusion.stickers.art import Art, open_art
from knn_diffusion.stickers.composing import compose, cut_out, trimmed
from knn_diffusion.stickers.compositions import RELATIONS, Sampler, Sticker, Thing, can_be_tinted
from knn_diffusion.stickers.datasets import make_stickers, stickers_of
from knn_diffusion.stickers.families import BUNDLED, HELD_OUT_FAMILY, TRAINED
from knn_diffusion.stickers.icons import read_package, render_package
from knn_diffusion.stickers.prompts import prompts
from knn_diffusion.stickers.tints import TINTS, body_of, oklab, palette, rgb, tint
from knn_diffusion.stickers.vocabulary import Concept, concept_named, held_out_pairs, vocabulary
from knn_diffusion.stickers.wording import captions, facts

PACKAGES = Path(__file__).parent / "fixtures" / "stickers"
CHOICES = st.sampled_from(["tinted", "paired", "varied"])


@pytest.fixture(scope="module")
def art(tmp_path_factory: pytest.TempPathFactory) -> Art:
    return make_art(tmp_path_factory.mktemp("art"))


def one(concept: str, family: str = "noto", **options: object) -> Sticker:
    tinted = options.pop("tint", None)
    return Sticker(family=family, things=(Thing(concept, tinted),), **options)  # type: ignore[arg-type]


def pair(relation: str, first: Thing = Thing("octopus"), second: Thing = Thing("rocket"), **options: object) -> Sticker:  # noqa: B008
    return Sticker(family="noto", things=(first, second), relation=relation, **options)  # type: ignore[arg-type]


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def words(text: str) -> set[str]:
    return set(re.findall(r"[^\W\d_]+", text.lower()))


# What there is, and what is held out


def test_every_concept_has_its_own_name_and_emoji() -> None:
    every = vocabulary()
    assert len({concept.name for concept in every}) == len({concept.char for concept in every}) == len(every) > 1200
    assert all(concept.name == concept.name.strip().lower() for concept in every)


def test_a_tenth_is_held_out_and_other_words_are_unnamed() -> None:
    solid = [concept for concept in vocabulary() if not concept.flat]
    assert 0.09 <= sum(concept.held_out for concept in solid) / len(solid) <= 0.11
    assert 0.05 <= sum(concept.unnamed for concept in solid) / len(solid) <= 0.07
    assert not [concept for concept in vocabulary() if concept.held_out and (concept.unnamed or concept.flat)]
    assert concept_named("pineapple").held_out


def test_words_of_unnamed_concepts_are_words_of_no_other() -> None:
    said = [text for concept in vocabulary() if not concept.unnamed for text in (concept.name, *concept.synonyms)]
    everything = set().union(*map(words, said))
    for concept in vocabulary():
        if concept.unnamed:
            assert not (words(concept.name) - {"of"}) & everything, concept.name
            assert not set(concept.synonyms) & set(said), concept.name


def test_everyday_words_are_words_of_no_name_and_no_synonym() -> None:
    said = set().union(*(words(text) for concept in vocabulary() for text in (concept.name, *concept.synonyms)))
    assert not set(everyday_words()) & (said | {word.removesuffix("s") for word in said})
    known = {concept.name: concept for concept in vocabulary()}
    for names in everyday_words().values():
        assert any(name in known and not known[name].held_out and not known[name].unnamed for name in names)


def test_held_out_pairs_join_a_tint_with_a_concept_that_takes_tints() -> None:
    assert ("teal", "pineapple") in held_out_pairs()
    assert all(tinted in TINTS for tinted, _ in held_out_pairs())
    assert len(held_out_pairs()) > 50


def test_an_unknown_concept_is_an_error() -> None:
    with pytest.raises(
        UsageError, match="expected the name of a sticker concept, got 'gryphon': choose one of vocabulary"
    ):
        concept_named("gryphon")


# Art


def test_a_folder_without_art_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match=r"expected sticker art as FAMILY/ICON.png .* found none: run recipes/fetch_art.py"
    ):
        open_art(tmp_path)


def test_a_family_shows_what_it_has_art_of(art: Art) -> None:
    assert {concept.icon for concept in art.concepts_of("noto")} == set(SHAPES)
    assert art.concepts_of("fluent-emoji") == ()
    with pytest.raises(UsageError, match="expected noto art of 'abacus'"):
        art.picture(concept_named("abacus"), "noto")


def test_the_digest_follows_the_art(tmp_path: Path) -> None:
    first, second = make_art(tmp_path / "a"), make_art(tmp_path / "b")
    shape((1, 2, 3), side=32).save(second.folder / "noto" / "key.png")
    assert first.digest != second.digest


def test_a_package_that_is_none_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"expected an unpacked icon package .* run recipes/fetch_art.py"):
        read_package(tmp_path)


@pytest.mark.parametrize("family", ["noto", "fluent-emoji-flat"])
def test_svg_bodies_become_transparent_pictures(family: str, tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    place = render_package(PACKAGES / family, tmp_path / family, ["octopus", "no-entry"])
    with Image.open(place / "octopus.png") as image:
        alpha = pixels(image)[..., 3]
    assert alpha.shape == (256, 256)
    assert alpha[0, 0] == 0
    assert (alpha == 255).mean() > 0.2
    assert json.loads((place / "info.json").read_text())["license"]["spdx"] in ("MIT", "Apache-2.0")
    assert {file.name for file in place.iterdir()} == {"octopus.png", "no-entry.png", "info.json"}


def test_drawing_goes_on_where_it_stopped(tmp_path: Path) -> None:
    pytest.importorskip("resvg_py")
    (tmp_path / "octopus.png").write_bytes(b"drawn before")
    render_package(PACKAGES / "noto", tmp_path, ["octopus", "key"])
    assert (tmp_path / "octopus.png").read_bytes() == b"drawn before"
    assert (tmp_path / "key.png").exists()


def fetch_art() -> Any:
    """The recipe as a module."""
    place = Path(__file__).parents[1] / "recipes" / "fetch_art.py"
    spec = importlib.util.spec_from_file_location("fetch_art", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_package_is_unpacked_only_when_its_content_is_the_recorded_one(tmp_path: Path) -> None:
    archive = tmp_path / "iconify-json-tiny-1.0.0.tgz"
    with tarfile.open(archive, "w:gz") as content:
        content.add(PACKAGES / "noto", "package")
    recorded = hashlib.sha256(archive.read_bytes()).hexdigest()
    with pytest.raises(SystemExit, match=f"with SHA-256 {'0' * 64}, got {recorded}: delete it and fetch again"):
        fetch_art().fetch("@iconify-json/tiny", "1.0.0", "0" * 64, tmp_path)
    place = fetch_art().fetch("@iconify-json/tiny", "1.0.0", recorded, tmp_path)
    assert set(read_package(place)) == set(read_package(PACKAGES / "noto"))
    assert {file.name for file in tmp_path.iterdir()} == {archive.name, place.name}


# Tints


def test_oklab_is_undone_exactly() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (4000, 3), dtype=np.uint8)
    assert np.array_equal(rgb(oklab(levels)), levels)


def test_oklab_has_the_published_values() -> None:
    # Ottosson 2020: white is (1, 0, 0); red has lightness 0.628, chroma 0.258 and hue 29.2 degrees.
    white, red = oklab(np.array([[255, 255, 255], [255, 0, 0]], np.uint8))
    assert np.allclose(white, (1, 0, 0), atol=1e-3)
    assert np.allclose(
        (red[0], np.hypot(*red[1:]), np.degrees(np.arctan2(red[2], red[1]))), (0.628, 0.258, 29.2), atol=0.05
    )


def test_a_palette_finds_the_colours_and_their_shares() -> None:
    seen = oklab(np.array([[220, 30, 30]] * 70 + [[30, 30, 220]] * 30, np.uint8))
    centres, shares = palette(seen)
    assert np.allclose(centres[0], seen[0])
    assert shares[:2].tolist() == [0.7, 0.3]


@pytest.mark.parametrize("name", ["red", "orange", "yellow", "green", "teal", "blue", "purple", "pink"])
def test_a_tinted_body_has_the_hue_and_eyes_and_outline_stay(name: str) -> None:
    plain = shape((220, 120, 60))
    body = body_of(plain)
    assert body is not None
    tinted = tint(plain, name, body)
    before, after = pixels(plain), pixels(tinted)
    assert np.array_equal(before[..., 3], after[..., 3])
    skin = (before[..., :3] == (220, 120, 60)).all(-1)
    lightness, a, b = oklab(np.asarray(tinted)[..., :3])[skin].mean(0)
    assert abs((np.degrees(np.arctan2(b, a)) - TINTS[name][2] + 180) % 360 - 180) < 12
    assert abs(lightness - TINTS[name][0]) < 0.06
    eyes = (before[..., :3] == (70, 40, 20)).all(-1)
    assert np.abs(before[eyes] - after[eyes]).max() < 12


def test_shading_stays_shading() -> None:
    shaded = shape((220, 120, 60))
    dark = pixels(shaded)
    dark[32:, :, :3] = (dark[32:, :, :3] * 0.8).astype(int)
    shaded = Image.fromarray(dark.astype(np.uint8), "RGBA")
    body = body_of(shaded)
    assert body is not None
    light = oklab(np.asarray(tint(shaded, "blue", body))[..., :3])[..., 0]
    assert light[20, 32] > light[46, 34] + 0.04


@pytest.mark.parametrize(("name", "borne"), [("black", False), ("brown", False), ("blue", True), ("yellow", True)])
def test_a_tint_that_swallows_the_eyes_is_not_borne(name: str, borne: bool) -> None:
    body = body_of(shape((240, 190, 60)))
    assert body is not None
    assert body.bears(name) == borne


@pytest.mark.parametrize(
    ("colour", "name"), [((215, 25, 30), "red"), ((130, 60, 190), "purple"), ((20, 250, 120), None)]
)
def test_a_sticker_as_it_is_may_have_a_named_colour(colour: tuple[int, int, int], name: str | None) -> None:
    body = body_of(shape(colour))
    assert body is not None
    assert body.colour() == name


@pytest.mark.parametrize(
    ("name", "able"), [("octopus", True), ("red heart", False), ("no entry", False), ("detective", False)]
)
def test_signs_people_and_names_of_colours_are_never_tinted(name: str, able: bool) -> None:
    assert can_be_tinted(concept_named(name)) == able


# Pictures


@pytest.mark.parametrize("options", [{}, {"bordered": True}, {"turned": 10}, {"mirrored": True}, {"tint": "teal"}])
def test_every_sticker_fills_its_frame_and_leaves_the_rest_transparent(options: dict[str, object], art: Art) -> None:
    alpha = pixels(compose(one("octopus", **options), 128, art))[..., 3]
    rows, columns = np.flatnonzero(alpha.max(1)), np.flatnonzero(alpha.max(0))
    spans = (rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1)
    assert max(spans) == 120
    assert abs(rows[0] + rows[-1] - 127) <= 1
    assert abs(columns[0] + columns[-1] - 127) <= 1


def test_art_that_fills_a_rectangle_is_framed_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "noto").mkdir()
    Image.new("RGBA", (64, 48), (20, 90, 160, 255)).save(tmp_path / "noto" / "octopus.png")
    image = compose(one("octopus"), 128, open_art(tmp_path))
    assert image.mode == "RGBA"
    assert image.getchannel("A").getbbox() == (4, 19, 124, 109)


def where(image: Image.Image, hue: str) -> tuple[float, float]:
    """Mean place (x, y) of what is mostly red or mostly blue."""
    red, _, blue, alpha = np.moveaxis(pixels(image), -1, 0)
    mask = ((red > blue + 60) if hue == "red" else (blue > red + 60)) & (alpha > 128)
    y, x = np.nonzero(mask)
    return float(x.mean()), float(y.mean())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("relation", RELATIONS)
def test_two_things_stand_as_the_relation_says(relation: str, seed: int, art: Art) -> None:
    image = compose(pair(relation, seed=seed), 128, art)
    (first_x, first_y), (second_x, second_y) = where(image, "red"), where(image, "blue")
    side, down = first_x - second_x, first_y - second_y
    if relation == "in front of":
        assert down > 0
    else:
        along, across = (side, down) if relation in ("left of", "right of") else (down, side)
        assert along * (1 if relation in ("right of", "below") else -1) > 30
        assert abs(across) < 15


def test_what_is_in_front_is_drawn_whole(art: Art) -> None:
    for seed in range(4):
        image = pixels(compose(pair("in front of", seed=seed), 128, art))
        reds = ((image[..., 0] > 150) & (image[..., 2] < 110) & (image[..., 3] > 128)).sum()
        blues = ((image[..., 2] > 150) & (image[..., 0] < 110) & (image[..., 3] > 128)).sum()
        alone = pixels(compose(pair("left of", seed=seed), 128, art))
        red_alone = ((alone[..., 0] > 150) & (alone[..., 2] < 110) & (alone[..., 3] > 128)).sum()
        blue_alone = ((alone[..., 2] > 150) & (alone[..., 0] < 110) & (alone[..., 3] > 128)).sum()
        assert blues / reds < blue_alone / red_alone
        assert blues > 0.4 * reds * blue_alone / red_alone


def test_a_border_is_white_and_goes_all_around() -> None:
    bordered = cut_out(trimmed(shape((220, 60, 60), side=256)))
    alpha, colour = pixels(bordered)[..., 3], pixels(bordered)[..., :3]
    outline = (alpha > 60) & (alpha < 250)
    assert outline.sum() > 300
    assert colour[outline].min() > 250
    assert alpha[0].max() == alpha[-1].max() == alpha[:, 0].max() == alpha[:, -1].max() == 0  # nothing is clipped


def test_a_border_fills_holes() -> None:
    ring = Image.new("RGBA", (60, 60), (200, 30, 30, 255))
    ring.paste((0, 0, 0, 0), (15, 15, 45, 45))
    bordered = cut_out(ring)
    assert bordered.getpixel((bordered.width // 2, bordered.height // 2)) == (255, 255, 255, 255)


def test_mirrored_stickers_are_the_plain_ones_seen_from_behind(art: Art) -> None:
    plain, mirrored = compose(one("octopus"), 64, art), compose(one("octopus", mirrored=True), 64, art)
    assert np.abs(pixels(plain)[:, ::-1] - pixels(mirrored))[..., 3].mean() < 3


def test_a_size_below_eight_is_an_error(art: Art) -> None:
    with pytest.raises(UsageError, match="expected a sticker size of at least 8 pixels, got 4: choose 128"):
        compose(one("octopus"), 4, art)


# Sampling


def test_training_never_shows_what_is_held_out(art: Art) -> None:
    shown = [thing for sticker in stickers_of("train", art, 1500, seed=2) for thing in sticker.things]
    assert not [thing for thing in shown if concept_named(thing.concept).held_out]
    assert not {(thing.tint, thing.concept) for thing in shown} & held_out_pairs()
    assert {thing.tint for thing in shown} >= {None, "purple", "blue"}


def test_without_the_rule_held_out_pairs_would_appear(art: Art, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knn_diffusion.stickers.compositions.held_out_pairs", frozenset)
    sampler = Sampler(art, FAMILIES, (concept_named("pineapple"),))
    drawn = {sampler.tinted(random.Random(seed)).things[0].tint for seed in range(200)}
    assert "teal" in drawn


def test_the_encoder_sees_held_out_concepts_and_no_unnamed_one(art: Art) -> None:
    shown = {thing.concept for sticker in stickers_of("encoder", art, 600) for thing in sticker.things}
    assert {"pineapple", "penguin"} <= shown
    assert "garlic" not in shown


def test_the_held_out_family_is_in_its_own_folder_only(art: Art) -> None:
    for kind in ("train", "encoder", "neighbors", "index", "held-out"):
        assert HELD_OUT_FAMILY not in {sticker.family for sticker in stickers_of(kind, art, 400)}  # type: ignore[arg-type]
    assert {sticker.family for sticker in stickers_of("held-out-family", art)} == {HELD_OUT_FAMILY}
    assert HELD_OUT_FAMILY not in TRAINED
    assert set(BUNDLED) <= set(TRAINED)


def test_every_plain_sticker_comes_first_and_once(art: Art) -> None:
    stickers = stickers_of("train", art, 200)
    known = sum(not concept_named(c.name).held_out for family in FAMILIES for c in art.concepts_of(family))
    assert len({(sticker.family, sticker.things) for sticker in stickers[:known]}) == known
    assert all(sticker == one(sticker.things[0].concept, sticker.family) for sticker in stickers[:known])


def test_neighbors_in_training_are_the_plain_stickers_that_training_begins_with(art: Art) -> None:
    neighbors = stickers_of("neighbors", art)
    assert neighbors == stickers_of("train", art, len(neighbors))
    assert {sticker.family for sticker in neighbors} == set(FAMILIES)


@given(seed=st.integers(0, 10**6), kind=CHOICES)
def test_a_sampled_sticker_is_of_one_family_and_turned_a_little(seed: int, kind: str, art: Art) -> None:
    sampler = Sampler(art, FAMILIES, vocabulary())
    sticker = getattr(sampler, kind)(random.Random(seed))
    assert all(art.path(concept_named(thing.concept), sticker.family) for thing in sticker.things)
    assert abs(sticker.turned) <= 12
    assert (sticker.relation is None) == (len(sticker.things) == 1)
    assert len({thing.concept for thing in sticker.things}) == len(sticker.things)


# Words


@given(seed=st.integers(0, 10**6), kind=CHOICES)
def test_every_caption_claims_what_is_true(seed: int, kind: str, art: Art) -> None:
    sticker = getattr(Sampler(art, FAMILIES, vocabulary()), kind)(random.Random(seed))
    known = set(facts(sticker))
    told = captions(sticker, random.Random(seed))
    assert all(caption.claims and set(caption.claims) <= known for caption in told)
    assert len({caption.text for caption in told}) == len(told)


def texts(sticker: Sticker) -> list[str]:
    return [caption.text for caption in captions(sticker, random.Random(0))]


def test_captions_are_plain_first_and_then_richer() -> None:
    assert texts(one("octopus"))[:3] == ["octopus", "an octopus", "an octopus sticker"]
    assert texts(one("octopus", tint="purple"))[:4] == [
        "purple octopus", "a purple octopus", "a purple octopus sticker", "octopus",
    ]  # fmt: skip
    assert "an octopus sticker with a white border" in texts(one("octopus", bordered=True))
    assert texts(pair("left of", Thing("octopus", "purple"))) == [
        "octopus and rocket",
        "a purple octopus and a rocket",
        "a purple octopus to the left of a rocket",
        "a rocket to the right of a purple octopus",
        "sticker of a purple octopus to the left of a rocket",
    ]


def test_synonyms_are_said_too() -> None:
    said = {
        text
        for seed in range(20)
        for caption in captions(one("rocket"), random.Random(seed))
        for text in [caption.text]
    }
    assert set(concept_named("rocket").synonyms) <= said


def test_a_caption_is_no_counterexample_where_it_is_true_as_well() -> None:
    cat_face = set(facts(Sticker(family="noto", things=(Thing("cat face"),))))
    assert set(captions(one("cat"), random.Random(0))[0].claims) <= cat_face  # a cat face is called a cat
    assert not set(captions(one("rocket"), random.Random(0))[0].claims) <= cat_face
    purple = captions(one("octopus", tint="purple"), random.Random(0))[0]
    assert not set(purple.claims) <= set(facts(one("octopus")))
    assert set(purple.claims) <= set(facts(one("octopus"), lambda thing: "purple"))  # drawn purple as it is
    left = captions(pair("left of"), random.Random(0))[2]
    assert set(left.claims) <= set(facts(pair("right of", Thing("rocket"), Thing("octopus"))))
    assert not set(left.claims) <= set(facts(pair("right of")))


# Folders


def test_a_folder_holds_pictures_captions_and_facts_for_any_number_of_processes(art: Art, tmp_path: Path) -> None:
    first = make_stickers(tmp_path / "one", "train", art, count=40, seed=1, size=32)
    done: list[tuple[int, int]] = []
    second = make_stickers(
        tmp_path / "two", "train", art, count=40, seed=1, size=32, processes=2, progress=lambda _, now, all_: done.append((now, all_))
    )  # fmt: skip
    assert done[-1] == (40, 40)
    assert (first / "captions.jsonl").read_bytes() == (second / "captions.jsonl").read_bytes()
    lines = [json.loads(line) for line in (first / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    for line, sticker in zip(lines, stickers_of("train", art, 40, 1), strict=True):
        with Image.open(first / line["file"]) as image:
            assert image.mode == "RGBA"
            assert image.tobytes() == compose(sticker, 32, art).tobytes()
        assert (first / line["file"]).read_bytes() == (second / line["file"]).read_bytes()
        assert [thing["concept"] for thing in line["things"]] == [thing.concept for thing in sticker.things]
        assert len(line["captions"]) == len(line["caption_facts"])
        assert line["family"] == sticker.family
    told = json.loads((first / "dataset.json").read_text(encoding="utf-8"))
    assert (told["kind"], told["art_sha256"]) == ("train", art.digest)


def test_a_folder_goes_on_where_it_stopped_and_refuses_another(art: Art, tmp_path: Path) -> None:
    make_stickers(tmp_path / "set", "held-out", art, size=32)
    before = {file.name: file.stat().st_mtime_ns for file in (tmp_path / "set").iterdir()}
    make_stickers(tmp_path / "set", "held-out", art, size=32)
    assert before == {file.name: file.stat().st_mtime_ns for file in (tmp_path / "set").iterdir()}
    with pytest.raises(UsageError, match="expected an empty folder or the same data set"):
        make_stickers(tmp_path / "set", "held-out", art, size=16)


def test_an_index_names_its_files_by_what_they_show(art: Art, tmp_path: Path) -> None:
    folder = make_stickers(tmp_path / "index", "index", art, size=32)
    names = {file.stem for file in folder.glob("*.png")}
    assert {"octopus (noto)", "octopus (twemoji)"} <= names
    assert not [name for name in names if name.startswith(("penguin", "pineapple")) or "emojione" in name]


def test_the_command_line_makes_the_same_folder(art: Art, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--art", str(art.folder), "--for", "held-out", "--size", "32", "--json"]
    assert main(["dataset", "stickers", str(tmp_path / "cli"), *arguments]) == 0
    told = json.loads(capsys.readouterr().out)
    folder = make_stickers(tmp_path / "python", "held-out", art, size=32)
    assert (folder / "captions.jsonl").read_bytes() == (tmp_path / "cli" / "captions.jsonl").read_bytes()
    assert (told["count"], told["split"]) == (len(list(folder.glob("*.png"))), "held-out")


# Prompts


@pytest.mark.parametrize("form", ["plain", "tinted", "paired"])
def test_prompts_that_choose_settings_share_no_concept_with_those_that_report(form: str) -> None:
    def named(purpose: str) -> set[Concept]:
        made = prompts(form, 3000, split="all", purpose=purpose)  # type: ignore[arg-type]
        return {concept_named(thing.concept) for prompt in made for thing in prompt.things}

    assert len(named("validation")) > 50
    assert not named("validation") & named("evaluation")
    assert not any(concept.flat for concept in named("evaluation"))


def test_held_out_prompts_ask_for_what_training_never_showed() -> None:
    assert all(concept_named(prompt.things[0].concept).held_out for prompt in prompts("plain", 50, split="held-out"))
    assert {
        (p.things[0].tint, p.things[0].concept) for p in prompts("tinted", 50, split="held-out")
    } <= held_out_pairs()
    shown = {(p.things[0].tint, p.things[0].concept) for p in prompts("tinted", 10_000, split="train")}
    assert not shown & held_out_pairs()
    assert not [prompt for prompt in prompts("plain", 5000) if concept_named(prompt.things[0].concept).held_out]


def test_prompts_follow_from_their_seed_and_read_like_captions() -> None:
    assert prompts("paired", 20, 3) == prompts("paired", 20, 3) != prompts("paired", 20, 4)
    for prompt in prompts("tinted", 30):
        thing = prompt.things[0]
        assert prompt.text in texts(one(thing.concept, tint=thing.tint))
