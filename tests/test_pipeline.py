"""The pipeline on a tiny world: repeatability, editing, what parts must have in common, saving."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_world import SIZE, STEPS, TransparentTokenizer, build_model, draw_pictures, same_pixels

from knn_diffusion import ImageIndex, KnnDiffusion
from knn_diffusion.diffusion.plan import SamplerConfig
from knn_diffusion.errors import CheckpointError, FingerprintError, KnnDiffusionError, StoreError, UsageError
from knn_diffusion.images import open_image, square
from knn_diffusion.model_folder import bundled_models, read_pipeline_file
from knn_diffusion.pipeline import images_at_once
from knn_diffusion.request import MAX_PROMPT_CHARACTERS, Output, Passed, check_prompt, check_request


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    return build_model(tmp_path_factory.mktemp("model") / "tiny", pictures)


@pytest.fixture(scope="module")
def pipe(model_folder: Path) -> KnnDiffusion:
    return KnnDiffusion.from_pretrained(model_folder, device="cpu")


@pytest.fixture
def own(model_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_an_output_holds_images_neighbors_and_what_made_them(pipe: KnnDiffusion) -> None:
    out = pipe("a red heart", num_images_per_prompt=2, k=4, guidance_scale=3.0, num_inference_steps=5, seed=7)
    assert [image.size for image in out.images] == [(SIZE, SIZE)] * 2
    assert (out.prompt, out.k, out.guidance_scale, out.steps, out.seed) == ("a red heart", 4, 3.0, 5, 7)
    assert len(out.neighbors) == 4
    assert out.shortfall == 0
    assert out.neighbors.scores == sorted(out.neighbors.scores, reverse=True)
    assert all(isinstance(one, str) and one for one in out.neighbors.ids)
    assert all(source.endswith(".png") for source in out.neighbors.sources)


def test_defaults_come_from_the_model(pipe: KnnDiffusion) -> None:
    out = pipe("a red heart")
    assert (len(out.images), out.k, out.guidance_scale, out.steps, out.sampler) == (1, 3, 2.0, 4, "halton")


def test_image_i_is_the_same_however_many_are_asked_for(pipe: KnnDiffusion) -> None:
    four = pipe("a blue circle", num_images_per_prompt=4, seed=3).images
    one = pipe("a blue circle", num_images_per_prompt=1, seed=3).images
    assert same_pixels(four[0], one[0])
    assert not same_pixels(four[0], four[1])


@pytest.mark.parametrize("size", [3, 8])
def test_image_i_is_the_same_in_micro_batches_of_any_filling(model_folder: Path, size: int) -> None:
    pipe = KnnDiffusion.from_pretrained(model_folder, device="cpu", dtype="float32")
    pipe.micro_batch = size
    five = pipe("a blue circle", num_images_per_prompt=5, seed=3).images
    two = pipe("a blue circle", num_images_per_prompt=2, seed=3).images
    assert np.array_equal(pixels(five[:2]), pixels(two))


def test_as_many_images_are_drawn_together_as_fill_the_device() -> None:
    """The paper's size fills a GPU with one image; on a CPU small ones do."""
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert [images_at_once(cuda, places) for places in (16, 64, 256, 1024, 4096)] == [64, 16, 4, 1, 1]
    assert [images_at_once(cpu, places) for places in (16, 1024)] == [1, 1]


def test_a_prompt_is_drawn_alike_alone_and_among_others(pipe: KnnDiffusion) -> None:
    alone = pipe("a green hat", num_images_per_prompt=2, seed=1)
    among = pipe(["a red heart", "a green hat"], num_images_per_prompt=2, seed=1)[1]
    assert np.array_equal(pixels(alone.images), pixels(among.images))
    assert alone.neighbors == among.neighbors


def test_seeds_draw_different_images_and_repeat(pipe: KnnDiffusion) -> None:
    first, again, other = (pipe("a cat", seed=seed).images[0] for seed in (0, 0, 1))
    assert same_pixels(first, again)
    assert not same_pixels(first, other)


def test_no_global_random_state_is_read_or_moved(pipe: KnnDiffusion) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = pipe("a cat").images[0]
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(2)
    assert same_pixels(first, pipe("a cat").images[0])


@pytest.mark.parametrize("order", ["ancestral", "halton", "confidence"])
def test_every_sampler_draws(pipe: KnnDiffusion, order: str) -> None:
    assert pipe("a cat", sampler=order).sampler == order


def test_a_sampler_configuration_may_be_given_whole(pipe: KnnDiffusion) -> None:
    out = pipe("a cat", sampler=SamplerConfig(num_steps=3, order="ancestral", guidance_scale=1.0))
    assert (out.steps, out.sampler, out.guidance_scale) == (3, "ancestral", 1.0)


def test_neighbors_change_what_is_drawn(pipe: KnnDiffusion) -> None:
    with_all = pipe("a cat", num_images_per_prompt=8)
    without = pipe("a cat", num_images_per_prompt=8, exclude_ids=with_all.neighbors.ids)
    assert set(with_all.neighbors.ids).isdisjoint(without.neighbors.ids)
    assert not np.array_equal(pixels(with_all.images), pixels(without.images))


def test_no_neighbors_at_all_draw_from_the_text_alone(pipe: KnnDiffusion) -> None:
    out = pipe("a cat", k=0)
    assert (out.neighbors, out.shortfall) == ([], 0)


def test_what_exclusion_leaves_short_is_said(pipe: KnnDiffusion) -> None:
    everything = pipe("a cat", k=len(pipe.index)).neighbors.ids
    out = pipe("a cat", k=3, exclude_ids=everything[1:])
    assert (len(out.neighbors), out.shortfall) == (1, 2)
    assert out.neighbors.ids == everything[:1]


def test_a_k_that_nobody_gave_is_at_most_what_the_index_holds(pipe: KnnDiffusion) -> None:
    small = pipe.index.overlay()
    small.remove(small.ids[2:])
    few = KnnDiffusion(pipe.model, small, device="cpu")
    out = few("a cat")
    assert (out.k, out.shortfall, len(out.neighbors)) == (2, 0, 2)
    with pytest.raises(UsageError, match="k must be between 1 and 2"):
        few("a cat", k=3)


def test_the_query_weight_mixes_the_neighbors_mean_into_the_query(pipe: KnnDiffusion) -> None:
    default = pixels(pipe("a cat", num_images_per_prompt=8).images)
    paper, mean = (pixels(pipe("a cat", num_images_per_prompt=8, query_weight=one).images) for one in (1.0, 0.0))
    assert np.array_equal(paper, default)
    assert not np.array_equal(mean, default)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 2.0])
def test_the_query_slot_lies_on_the_line_through_the_text_and_the_neighbors_mean(
    pipe: KnnDiffusion, weight: float
) -> None:
    sampler, k = pipe.model.sampler, 3
    request = check_request({"k": k, "query_weight": weight}, sampler=sampler, k=k)
    condition, *_ = pipe.retrieve("a cat", request)
    text = pipe.model.encoder.encode_texts(["a cat"])[0].astype(np.float64)
    mean = condition.y[0, 1:].double().numpy().sum(0)
    mean /= np.linalg.norm(mean)
    expected = text + (1 - weight) * (mean - text)
    np.testing.assert_allclose(condition.y[0, 0].numpy(), expected / np.linalg.norm(expected), atol=1e-6)


def test_the_callback_counts_over_all_images_and_can_cancel(pipe: KnnDiffusion) -> None:
    told: list[Passed] = []
    pipe("a cat", num_images_per_prompt=2, callback=told.append)
    assert [passed.done for passed in told] == list(range(1, told[-1].total + 1))
    assert {passed.numbers for passed in told} == {(0,), (1,)}
    assert int(told[0].info.x_0.max()) < pipe.tokenizer.vocab_size

    def cancel(passed: Passed) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe("a cat", callback=cancel)


def test_each_image_is_delivered_before_the_next_is_begun(pipe: KnnDiffusion, pictures: Path) -> None:
    told: list[object] = []

    def deliver(number: int, output: Output) -> None:
        told.append((number, pixels(output.images).tobytes(), output.seed, output.neighbors.ids))

    def drawn(passed: Passed) -> None:
        told.append(passed.numbers)

    settings: Any = {"num_images_per_prompt": 3, "seed": 5, "on_image": deliver, "callback": drawn}
    calls = (lambda: pipe("a cat", **settings), lambda: pipe.edit(pictures / "red-bar.png", "a hat", **settings))
    for call in calls:
        out = call()
        delivered = [one for one in told if len(one) == 4]  # type: ignore[arg-type]
        assert delivered == [(i, pixels([image]).tobytes(), 5, out.neighbors.ids) for i, image in enumerate(out.images)]
        assert told.index(delivered[0]) < told.index((1,)) < told.index(delivered[1]) < told.index((2,))
        told.clear()


def test_an_edit_that_leaves_the_image_delivers_it_too(pipe: KnnDiffusion, pictures: Path) -> None:
    told: list[int] = []
    pipe.edit(
        pictures / "red-bar.png", "a hat", 0.0, num_images_per_prompt=2, on_image=lambda number, _: told.append(number)
    )
    assert told == [0, 1]


def test_a_tokenizer_with_alpha_draws_transparent_images(pipe: KnnDiffusion) -> None:
    clear = KnnDiffusion(
        replace(pipe.model, tokenizer=TransparentTokenizer(pipe.model.tokenizer)), pipe.index, device="cpu"
    )
    assert (clear.transparent, pipe.transparent) == (True, False)
    (image,), (opaque,) = clear("a cat", seed=3).images, pipe("a cat", seed=3).images
    assert (image.mode, opaque.mode) == ("RGBA", "RGB")
    levels = np.asarray(image)
    assert (levels[0] == 0).all()
    assert (levels[2:-2, 2:-2, 3] == 255).all()
    assert np.array_equal(levels[2:-2, 2:-2, :3], np.asarray(opaque)[2:-2, 2:-2])


@pytest.mark.parametrize("prompt", ["", "   \n", "\u200b", None, 3])
def test_an_empty_prompt_is_refused(pipe: KnnDiffusion, prompt: Any) -> None:
    with pytest.raises(UsageError, match="describe the picture in words"):
        check_prompt(prompt)
    with pytest.raises(UsageError, match="describe the picture in words"):
        pipe(["a cat", ""])


def test_an_over_long_prompt_is_refused(pipe: KnnDiffusion) -> None:
    with pytest.raises(UsageError, match=f"at most {MAX_PROMPT_CHARACTERS} characters, got 1201: say it more shortly"):
        pipe("cat " * 300 + "x")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"k": 13}, "13"),
        ({"k": -1}, "expected k from 0"),
        ({"num_images_per_prompt": 0}, "expected num_images_per_prompt from 1"),
        ({"num_images_per_prompt": 1.5}, "as a whole number, got 1.5"),
        ({"num_inference_steps": STEPS + 1}, f"at most {STEPS} steps"),
        ({"num_inference_steps": 0}, "expected num_inference_steps from 1"),
        ({"guidance_scale": float("nan")}, "expected guidance_scale as a finite number"),
        ({"guidance_scale": -1}, "guidance_scale must be at least 0"),
        ({"seed": -1}, "expected seed from 0"),
        ({"sampler": "fast"}, "expected sampler as one of ancestral, halton, confidence, got 'fast'"),
        ({"query_weight": 4}, "expected query_weight from 0 to 3, got 4"),
        ({"exclude_ids": "abc"}, "put it in a list"),
    ],
)
def test_an_impossible_setting_is_refused_as_wrong_use(pipe: KnnDiffusion, settings: Any, text: str) -> None:
    with pytest.raises(UsageError, match=text) as caught:
        pipe("a cat", **settings)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_an_option_that_does_not_exist_is_named(pipe: KnnDiffusion) -> None:
    with pytest.raises(TypeError, match="unknown option 'steps'"):
        pipe("a cat", steps=3)  # type: ignore[call-overload]


def test_strength_0_leaves_the_image_as_it_is(pipe: KnnDiffusion, pictures: Path) -> None:
    image = open_image(pictures / "red-circle.png")
    out = pipe.edit(image, "a hat", strength=0.0, num_images_per_prompt=2)
    assert all(same_pixels(one, square(image, SIZE)) for one in out.images)


def test_strength_1_starts_from_all_mask(pipe: KnnDiffusion, pictures: Path) -> None:
    seen: list[int] = []
    pipe.edit(pictures / "red-circle.png", "a hat", strength=1.0, callback=lambda passed: seen.append(passed.info.step))
    whole: list[int] = []
    pipe("a hat", callback=lambda passed: whole.append(passed.info.step))
    assert seen == whole


def test_little_strength_keeps_more_of_the_image_than_much(pipe: KnnDiffusion, pictures: Path) -> None:
    image = open_image(pictures / "blue-square.png")
    kept = pipe.tokenizer.encode(_as_pixels(pipe, image))[0]
    same = {}
    for strength in (1 / STEPS, 1.0):
        last: list[Passed] = []
        pipe.edit(image, "a red heart", strength=strength, num_images_per_prompt=8, callback=last.append)
        drawn = torch.cat([p.info.x_n for p in last if p.info.index == p.info.total])
        same[strength] = float((drawn == kept).float().mean())
    assert same[1 / STEPS] > same[1.0]


def _as_pixels(pipe: KnnDiffusion, image: Image.Image) -> torch.Tensor:
    from knn_diffusion.images import pixels_from_uint8, to_array

    return pixels_from_uint8(to_array(square(image, SIZE))[None])


def test_editing_depends_on_the_image_even_from_all_mask(pipe: KnnDiffusion, pictures: Path) -> None:
    red, blue = (
        pipe.edit(pictures / name, "a hat", strength=1.0, num_images_per_prompt=8).images
        for name in ("red-bar.png", "blue-square.png")
    )
    assert not np.array_equal(pixels(red), pixels(blue))


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_outside_0_to_1_is_refused(pipe: KnnDiffusion, pictures: Path, strength: float) -> None:
    with pytest.raises(UsageError, match="expected strength from 0 to 1"):
        pipe.edit(pictures / "red-bar.png", "a hat", strength=strength)


def test_editing_without_neighbors_is_refused(pipe: KnnDiffusion, pictures: Path) -> None:
    with pytest.raises(UsageError, match="k of at least 1"):
        pipe.edit(pictures / "red-bar.png", "a hat", k=0)


def test_a_saved_model_draws_the_same_pixels(pipe: KnnDiffusion, tmp_path: Path) -> None:
    again = KnnDiffusion.from_pretrained(pipe.save_pretrained(tmp_path / "copy"), device="cpu")
    assert same_pixels(again("a cat").images[0], pipe("a cat").images[0])
    assert len(again.index) == len(pipe.index)
    assert (tmp_path / "copy" / "README.md").read_text().startswith("---\nlicense: mit\n")


def test_a_model_made_in_memory_is_saved_whole(pipe: KnnDiffusion, tmp_path: Path) -> None:
    fresh = KnnDiffusion(replace(pipe.model, folder=None), pipe.index, device="cpu")
    again = KnnDiffusion.from_pretrained(fresh.save_pretrained(tmp_path / "fresh"), device="cpu")
    assert same_pixels(again("a cat").images[0], pipe("a cat").images[0])


def test_saving_replaces_a_model_but_no_other_folder(pipe: KnnDiffusion, own: Path, tmp_path: Path) -> None:
    pipe.save_pretrained(own)
    assert len(KnnDiffusion.from_pretrained(own, device="cpu").index) == len(pipe.index)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        pipe.save_pretrained(tmp_path / "letters")
    assert (tmp_path / "letters" / "dear.txt").read_text() == "mine"


def test_an_index_saved_in_place_goes_on_taking_images(own: Path, tmp_path: Path) -> None:
    pipe = KnnDiffusion.from_pretrained(own, device="cpu")
    for number in range(2):
        if number == 1:
            pipe.save_pretrained(own)
        Image.new("RGB", (20, 20), (250, 90 * number, 250)).save(tmp_path / f"{number}.png")
        pipe.index.add([tmp_path / f"{number}.png"])
    assert pipe("a cat").neighbors
    assert len(pipe.index) == len(KnnDiffusion.from_pretrained(own, device="cpu").index) == 14


def test_a_full_disk_while_saving_keeps_the_old_model(
    pipe: KnnDiffusion, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = (own / "pipeline.json").read_bytes()
    monkeypatch.setattr("knn_diffusion.model_folder.shutil.copytree", full)
    with pytest.raises(KnnDiffusionError, match="the disk is full"):
        pipe.save_pretrained(own)
    monkeypatch.undo()
    assert (own / "pipeline.json").read_bytes() == before
    assert [path.name for path in own.parent.iterdir()] == ["model"]
    KnnDiffusion.from_pretrained(own, device="cpu")


def test_an_added_image_is_found_by_the_next_request(pipe: KnnDiffusion, own: Path, tmp_path: Path) -> None:
    live = KnnDiffusion.from_pretrained(own, device="cpu")
    Image.new("RGB", (20, 20), (250, 0, 250)).save(tmp_path / "pink.png")
    count = len(live.index)
    live.index.add([tmp_path / "pink.png"])
    assert len(live.index) == count + 1
    assert any(source.endswith("pink.png") for source in live("a cat", k=count + 1).neighbors.sources)


def test_a_model_without_index_says_how_to_get_one(own: Path) -> None:
    shutil.rmtree(own / "index")
    pipe = KnnDiffusion.from_pretrained(own, device="cpu")
    with pytest.raises(StoreError, match="has none of its own: name one"):
        pipe("a cat")


def test_an_index_of_another_encoder_is_refused(pipe: KnnDiffusion, pictures: Path, tmp_path: Path) -> None:
    other = build_model(tmp_path / "other", pictures, seed=1)
    with pytest.raises(FingerprintError, match="encoder"):
        KnnDiffusion.from_pretrained(pipe.model.folder, index=other / "index", device="cpu")
    with pytest.raises(FingerprintError, match="rebuild the index with the model's encoder"):
        pipe.index = ImageIndex.open(other / "index")


@pytest.mark.parametrize("part", ["encoder", "tokenizer", "denoiser"])
def test_a_missing_part_is_named(own: Path, part: str) -> None:
    shutil.rmtree(own / part)
    with pytest.raises(
        CheckpointError, match=f"expected the model's {part} in .*, found none: copy the whole folder again"
    ):
        KnnDiffusion.from_pretrained(own, device="cpu")


@pytest.mark.parametrize("part", ["encoder", "tokenizer", "denoiser"])
def test_one_flipped_bit_is_noticed(own: Path, part: str) -> None:
    path = own / part / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        KnnDiffusion.from_pretrained(own, device="cpu")


@pytest.mark.parametrize("name", ["pipeline.json", "encoder/config.json", "denoiser/config.json"])
def test_a_damaged_description_is_a_damaged_model(own: Path, name: str) -> None:
    (own / name).write_bytes(b"\0" * 20)
    with pytest.raises(CheckpointError, match="is not valid json"):
        KnnDiffusion.from_pretrained(own, device="cpu")


def test_a_part_of_another_model_is_noticed(own: Path, tmp_path: Path) -> None:
    other = build_model(tmp_path / "other", seed=1)
    for part in ("tokenizer", "denoiser", "encoder"):
        mixed = Path(shutil.copytree(own, tmp_path / f"with-{part}"))
        shutil.rmtree(mixed / part)
        shutil.copytree(other / part, mixed / part)
        with pytest.raises(FingerprintError, match=f"written for the {part}"):
            KnnDiffusion.from_pretrained(mixed, device="cpu")


def test_a_denoiser_trained_with_another_encoder_is_noticed(own: Path) -> None:
    facts = json.loads((own / "denoiser" / "config.json").read_text())
    facts["extra"]["encoder"] = "0" * 64
    (own / "denoiser" / "config.json").write_text(json.dumps(facts))
    with pytest.raises(FingerprintError, match="the denoiser was trained with the encoder 0000"):
        KnnDiffusion.from_pretrained(own, device="cpu")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"format_version": 99}, CheckpointError, "upgrade knn-diffusion"),
        ({"colour": "red"}, KnnDiffusionError, "colour"),
        ({"k": -1}, KnnDiffusionError, "k must be at least 0"),
    ],
)
def test_a_strange_pipeline_file_is_refused(
    own: Path, change: dict[str, Any], error: type[Exception], text: str
) -> None:
    values = json.loads((own / "pipeline.json").read_text())
    (own / "pipeline.json").write_text(json.dumps(values | change))
    with pytest.raises(error, match=text):
        KnnDiffusion.from_pretrained(own, device="cpu")


def test_an_unknown_model_name_lists_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=r"bundled name \(.*\) or owner/name on the hub, got 'no-such-model'"):
        KnnDiffusion.from_pretrained("no-such-model")


def test_the_model_card_tells_the_facts(own: Path) -> None:
    card = (own / "README.md").read_text()
    assert "## Data\n\nrandom" in card
    assert read_pipeline_file(own).parts["denoiser"][:16] in card


def test_a_device_that_is_not_here_is_refused(own: Path) -> None:
    with pytest.raises(UsageError, match="use --device auto"):
        KnnDiffusion.from_pretrained(own, device="cuda:99")


@pytest.mark.slow
@pytest.mark.parametrize("name", bundled_models())
def test_a_bundled_model_is_sound_and_draws(name: str) -> None:
    pipe = KnnDiffusion.from_pretrained(name)
    out = pipe("a red heart", num_images_per_prompt=2)
    assert len(out.images) == 2
