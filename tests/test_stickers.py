"""The sticker world, drawn from the fixture glyphs so that no font is needed."""

from __future__ import annotations

import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from knn_diffusion import stickers
from knn_diffusion.errors import KnnDiffusionError, MissingDependencyError, UsageError
from knn_diffusion.stickers import FolderGlyphs, FontGlyphs, Scene, Thing
from knn_diffusion.stickers.glyphs import glyph_file_name

GLYPHS = FolderGlyphs(Path(__file__).parent / "fixtures" / "glyphs")
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")


def apple(background_colour: str = "blue", **options: object) -> Scene:
    return stickers.one_object_scene(stickers.concept_named("apple"), background_colour, 7, **options)  # type: ignore[arg-type]


def test_every_concept_has_its_own_name_and_picture() -> None:
    every = stickers.concepts()
    assert len({concept.name for concept in every}) == len({concept.char for concept in every}) == len(every) > 1300
    assert all(concept.name == concept.name.strip().lower() for concept in every)


def test_a_tenth_of_the_solid_concepts_is_held_out_and_pineapple_is_among_them() -> None:
    solid = [concept for concept in stickers.concepts() if not concept.flat]
    held_out = stickers.of_split(solid, "held-out")
    assert 0.09 <= len(held_out) / len(solid) <= 0.1
    assert stickers.concept_named("pineapple") in held_out
    assert not [concept for concept in stickers.concepts() if concept.flat and concept.held_out]
    assert len(stickers.of_split(solid, "train")) + len(held_out) == len(stickers.of_split(solid, "all"))


def test_held_out_pairs_join_a_tint_with_a_training_concept_save_teal_pineapple() -> None:
    pairs = stickers.held_out_pairs()
    assert len(pairs) == 61
    assert ("teal", "pineapple") in pairs
    for tint, name in pairs - {("teal", "pineapple")}:
        assert tint in stickers.TINTS
        assert not stickers.concept_named(name).held_out


def test_training_scenes_never_show_what_is_held_out() -> None:
    scenes = stickers.sample_scenes(8000, seed=3)
    shown = [(thing.tint, thing.name) for scene in scenes for thing in scene.things]
    assert not {name for _, name in shown} & {concept.name for concept in stickers.concepts() if concept.held_out}
    assert not set(shown) & stickers.held_out_pairs()


def test_without_the_split_held_out_pairs_do_appear() -> None:
    lone = [stickers.concept_named(next(name for tint, name in sorted(stickers.held_out_pairs()) if tint == "teal"))]
    for split, expected in (("all", True), ("train", False)):
        tints = {stickers.sample_scene(seed, lone, split).things[0].tint for seed in range(1000)}  # type: ignore[arg-type]
        assert ("teal" in tints) == expected


def test_held_out_scenes_show_held_out_concepts_only() -> None:
    names = {thing.name for scene in stickers.sample_scenes(500, 0, "held-out") for thing in scene.things}
    assert all(stickers.concept_named(name).held_out for name in names)
    assert len(names) > 100


def test_sampling_uses_every_background_colour_relation_and_tint_and_never_tints_a_named_colour() -> None:
    scenes = stickers.sample_scenes(2000, seed=0)
    things = [thing for scene in scenes for thing in scene.things]
    assert {scene.background for scene in scenes} == set(stickers.BACKGROUNDS)
    assert {scene.background_colour for scene in scenes} == set(stickers.COLOURS)
    assert {scene.relation for scene in scenes} == {None, *stickers.RELATIONS}
    assert {thing.tint for thing in things} == {None, *stickers.TINTS}
    assert not [thing for thing in things if thing.tint and thing.name.endswith("red heart")]
    assert not [scene for scene in scenes if any(thing.tint == scene.background_colour for thing in scene.things)]
    assert all((scene.relation is None) == (len(scene.things) == 1) for scene in scenes)


def test_the_same_seed_gives_the_same_scene_and_the_same_pixels() -> None:
    among = stickers.concepts(GLYPHS)
    once, again = (stickers.sample_scene(11, among) for _ in range(2))
    assert once == again
    assert stickers.draw(once, 64, GLYPHS).tobytes() == stickers.draw(again, 64, GLYPHS).tobytes()
    assert stickers.sample_scene(12, among) != once


@pytest.mark.parametrize("size", [16, 64, 100, 128, 160])
def test_a_scene_is_drawn_at_the_size_asked_for(size: int) -> None:
    picture = stickers.draw(apple(), size, GLYPHS)
    assert (picture.mode, picture.size) == ("RGB", (size, size))


@pytest.mark.parametrize("background", stickers.BACKGROUNDS)
def test_every_background_colour_can_be_told_from_the_corners(background: str) -> None:
    from knn_diffusion.stickers.drawing import shade

    for colour in stickers.COLOURS:
        pixels = np.asarray(stickers.draw(apple(colour, background=background), 64, GLYPHS), np.float32)
        border = np.concatenate([pixels[:6].reshape(-1, 3), pixels[-6:].reshape(-1, 3)])
        brightest = np.percentile(border, 80, axis=0)
        gaps = {name: float(np.abs(brightest - shade(name)).sum()) for name in stickers.COLOURS}
        assert min(gaps, key=lambda name: gaps[name]) == colour


def test_a_tint_changes_the_hue_and_keeps_light_and_dark() -> None:
    plain = np.asarray(stickers.draw(apple("white"), 64, GLYPHS), np.float32)[20:44, 20:44]
    teal = np.asarray(stickers.draw(apple("white", tint="teal"), 64, GLYPHS), np.float32)[20:44, 20:44]
    assert plain[..., 0].mean() > plain[..., 2].mean() + 50
    assert teal[..., 0].mean() < teal[..., 2].mean() - 50
    luma = np.array([0.299, 0.587, 0.114], np.float32)
    assert np.corrcoef((plain @ luma).ravel(), (teal @ luma).ravel())[0, 1] > 0.6


def test_an_outline_adds_white_around_the_object() -> None:
    bare, outlined = (
        np.asarray(stickers.draw(apple("black", outlined=outlined), 64, GLYPHS)) for outlined in (False, True)
    )
    assert (outlined.min(axis=-1) > 240).sum() > (bare.min(axis=-1) > 240).sum() + 50


def _ink_centre(picture: Image.Image, hue: str) -> tuple[float, float]:
    red, green, blue = np.moveaxis(np.asarray(picture, np.float32), -1, 0)
    ink = (red - green > 80) if hue == "red" else (green - red > 30) & (green - blue > 30)
    rows, columns = np.nonzero(ink)
    return float(columns.mean()), float(rows.mean())


@pytest.mark.parametrize("relation", stickers.RELATIONS)
def test_things_stand_to_each_other_as_the_relation_says(relation: str) -> None:
    things = tuple(Thing(stickers.concept_named(name).char, name) for name in ("red heart", "green heart"))
    picture = stickers.draw(Scene(5, "plain", "white", things, relation), 96, GLYPHS)
    (red_x, red_y), (green_x, green_y) = _ink_centre(picture, "red"), _ink_centre(picture, "green")
    holds = {"left of": red_x < green_x - 20, "right of": red_x > green_x + 20, "above": red_y < green_y - 20,
             "below": red_y > green_y + 20, "in front of": red_x < green_x and red_y > green_y}  # fmt: skip
    assert holds[relation]


def test_flips_and_turns_move_the_pixels() -> None:
    char = stickers.concept_named("guitar").char
    variants = [Thing(char, "guitar"), Thing(char, "guitar", flipped=True), Thing(char, "guitar", turned=180)]
    drawn = {stickers.draw(Scene(0, "plain", "blue", (thing,)), 64, GLYPHS).tobytes() for thing in variants}
    assert len(drawn) == 3


def test_the_caption_tells_everything() -> None:
    robot, bacon = (stickers.concept_named(name).char for name in ("robot", "bacon"))
    scene = Scene(
        0,
        "striped",
        "orange",
        (Thing(robot, "robot", "teal", outlined=True), Thing(bacon, "bacon", turned=180)),
        "above",
    )
    assert stickers.caption(scene) == "a teal robot sticker above upside-down bacon on a striped orange background"


def test_training_captions_vary_and_always_name_the_things() -> None:
    for scene in stickers.sample_scenes(50, seed=1):
        told = stickers.captions(scene, random.Random(0), 30)
        assert len(set(told)) > 8
        assert all(thing.name in text for text in told for thing in scene.things)
        colours = {word for text in told for word in re.findall(r"(\w+) background", text)}
        assert colours <= {scene.background_colour, *stickers.BACKGROUNDS}


@pytest.mark.parametrize(
    ("noun", "phrase"),
    [
        ("apple", "an apple"), ("scissors", "scissors"), ("bacon", "bacon"), ("unicorn", "a unicorn"), ("bus", "a bus"),
        ("hourglass", "an hourglass"), ("euro banknote", "a euro banknote"), ("nest with eggs", "a nest with eggs"),
        ("people hugging", "people hugging"), ("person lifting weights", "a person lifting weights"), ("x-ray", "an x-ray"),
    ],
)  # fmt: skip
def test_names_get_the_article_english_gives_them(noun: str, phrase: str) -> None:
    assert stickers.with_article(noun) == phrase


def test_evaluation_prompts_name_solid_concepts_once_each_with_even_colours() -> None:
    prompts = stickers.evaluation_prompts(0, 200)
    assert prompts == stickers.evaluation_prompts(0, 200)
    assert len({concept.name for _, concept, _ in prompts}) == 200
    assert not [concept for _, concept, _ in prompts if concept.flat or concept.held_out]
    counts = [sum(colour == other for _, _, other in prompts) for colour in stickers.COLOURS]
    assert max(counts) - min(counts) <= 1
    assert all(concept.name in text and f"{colour} background" in text for text, concept, colour in prompts)
    assert all(concept.held_out for _, concept, _ in stickers.evaluation_prompts(0, 30, "held-out"))


def test_everyday_words_are_no_concept_names_nor_words_of_them() -> None:
    words = stickers.everyday_words()
    known = {concept.name: concept for concept in stickers.concepts()}
    used = {part for name in known for part in re.findall(r"[a-z]+", name)}
    assert len(words) >= 60
    assert not set(words) & used
    assert all(names and all(name in known and not known[name].held_out for name in names) for names in words.values())


def test_everyday_words_are_no_words_of_the_emoji_names_either() -> None:
    emoji = pytest.importorskip("emoji")
    official = {part for facts in emoji.EMOJI_DATA.values() for part in re.findall(r"[a-z]+", facts["en"].lower())}
    assert not set(stickers.everyday_words()) & official


@pytest.mark.parametrize("processes", [1, 2])
def test_rendered_arrays_equal_single_drawings_for_any_number_of_processes(processes: int) -> None:
    scenes = stickers.sample_scenes(260 if processes == 2 else 20, 4, "all", GLYPHS)
    done: list[tuple[int, int]] = []
    pixels = stickers.render_array(scenes, 16, GLYPHS, processes, lambda _, now, total: done.append((now, total)))
    assert pixels.shape == (len(scenes), 16, 16, 3)
    assert done[-1] == (len(scenes), len(scenes))
    for number in (0, 11, len(scenes) - 1):
        assert np.array_equal(pixels[number], np.asarray(stickers.draw(scenes[number], 16, GLYPHS)))


def test_a_data_set_holds_pictures_captions_and_facts(tmp_path: Path) -> None:
    folder = stickers.make_dataset(tmp_path / "set", 6, seed=2, size=32, glyphs=GLYPHS)
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()]
    scenes = stickers.sample_scenes(6, 2, "train", GLYPHS)
    assert [line["caption"] for line in lines] == [stickers.caption(scene) for scene in scenes]
    with Image.open(folder / lines[3]["file"]) as picture:
        assert picture.tobytes() == stickers.draw(scenes[3], 32, GLYPHS).tobytes()
    facts = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    assert facts["split_digest"] == stickers.split_digest()
    assert facts["glyphs_sha256"] == GLYPHS.digest
    assert {file.suffix for file in folder.iterdir()} == {".png", ".jsonl", ".json"}


def test_a_data_set_cut_short_is_finished_by_the_same_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stickers.make_dataset(tmp_path / "whole", 5, glyphs=GLYPHS, size=16)

    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stickers.make_dataset(tmp_path / "cut", 5, glyphs=GLYPHS, size=16, progress=stop)
    (tmp_path / "cut" / "0000003.png").unlink()
    cut = stickers.make_dataset(tmp_path / "cut", 5, glyphs=GLYPHS, size=16)
    stickers.make_dataset(tmp_path / "cut", 5, glyphs=GLYPHS, size=16)
    assert {file.name: file.read_bytes() for file in cut.iterdir()} == {
        file.name: file.read_bytes() for file in whole.iterdir()
    }


def test_a_data_set_is_never_written_over_something_else(tmp_path: Path) -> None:
    stickers.make_dataset(tmp_path / "set", 2, glyphs=GLYPHS, size=16)
    with pytest.raises(UsageError, match="holds another: choose another folder"):
        stickers.make_dataset(tmp_path / "set", 3, glyphs=GLYPHS, size=16)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        stickers.make_dataset(tmp_path, 2, glyphs=GLYPHS, size=16)
    with pytest.raises(UsageError, match="at least 1 picture, got 0"):
        stickers.make_dataset(tmp_path / "none", 0, glyphs=GLYPHS)


def test_a_full_disk_is_told_in_one_line_and_the_run_can_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Image.Image, path: Path, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", full)
        with pytest.raises(
            KnnDiffusionError, match=r"cannot write the data set .* \(No space left on device\): free space"
        ):
            stickers.make_dataset(tmp_path / "set", 2, glyphs=GLYPHS, size=16)
    assert (stickers.make_dataset(tmp_path / "set", 2, glyphs=GLYPHS, size=16) / "dataset.json").exists()


def test_a_missing_font_says_how_to_install_it(tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match="apt install fonts-noto-color-emoji") as caught:
        FontGlyphs(tmp_path / "none.ttf")
    assert "\n" not in str(caught.value)
    wrong = tmp_path / "wrong.ttf"
    wrong.write_bytes(b"no font at all")
    with pytest.raises(MissingDependencyError, match="expected a bitmap colour font"):
        FontGlyphs(wrong)("x")


def test_unknown_names_colours_and_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="got 'dragonfruit'"):
        stickers.concept_named("dragonfruit")
    with pytest.raises(UsageError, match="got 'mauve': choose one of red"):
        apple("mauve")
    with pytest.raises(UsageError, match="got 'paisley': choose one of plain"):
        apple(background="paisley")
    with pytest.raises(UsageError, match="at least 8 pixels, got 4"):
        stickers.draw(apple(), 4, GLYPHS)
    with pytest.raises(UsageError, match=f"no readable {glyph_file_name('🪑')}"):
        GLYPHS("🪑")
    with pytest.raises(UsageError, match="expected concepts of the split 'held-out', got none"):
        stickers.sample_scene(0, [stickers.concept_named("apple")], "held-out")


def test_fixture_glyphs_are_concepts_of_every_kind() -> None:
    drawable = stickers.concepts(GLYPHS)
    assert len(drawable) == len(GLYPHS.characters) >= 24
    assert {(concept.flat, concept.held_out) for concept in drawable} == {(False, False), (True, False), (False, True)}


@pytest.mark.skipif(not FONT.exists(), reason="Noto Color Emoji is not installed")
def test_the_font_draws_the_fixture_glyphs() -> None:
    font = FontGlyphs(os.fspath(FONT))
    for char in sorted(GLYPHS.characters)[:5]:
        assert np.array_equal(np.asarray(font(char)), np.asarray(GLYPHS(char)))


@pytest.mark.slow
@pytest.mark.skipif(not FONT.exists(), reason="Noto Color Emoji is not installed")
def test_the_split_file_is_made_again_alike() -> None:
    pytest.importorskip("emoji")
    from knn_diffusion.stickers.split import build_split, split_text

    path = Path(stickers.__file__).parents[1] / "data" / "stickers_split.json"
    assert split_text(build_split(FontGlyphs())) == path.read_text(encoding="utf-8")
