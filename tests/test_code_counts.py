"""Counting codes, keeping those that are used, and training on the small vocabulary: from images to a model that draws."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_training_denoiser import tiny_run
from tiny_world import GRID, SIZE, VOCAB, build_model, draw_pictures

from knn_diffusion import KnnDiffusion
from knn_diffusion.cli import main
from knn_diffusion.config import from_dict, to_dict
from knn_diffusion.errors import FingerprintError, UsageError
from knn_diffusion.image_index import ImageIndex
from knn_diffusion.images import pixels_from_uint8, square, to_array
from knn_diffusion.models.taming import TamingConfig, TamingTokenizer
from knn_diffusion.models.tokenizer_protocol import Tokenizer
from knn_diffusion.models.tokenizers import load_tokenizer, save_tokenizer
from knn_diffusion.tokens import TokenFolder, makers_of
from knn_diffusion.training.code_counts import count_codes
from knn_diffusion.training.denoiser import DenoiserRun, train_denoiser
from knn_diffusion.training.options import RunOptions


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, a model with its index, and a tokenizer of taming's kind that fits into it."""
    place = tmp_path_factory.mktemp("world")
    build_model(place / "model", draw_pictures(place / "pictures"))
    torch.manual_seed(0)
    sizes = {"image_size": SIZE, "vocab_size": VOCAB, "code_dim": 4, "latent_dim": 4, "channels": 32}
    config = TamingConfig(**sizes, channel_multipliers=(1, 1, 1), attention_levels=(2,), quantizer="nearest")
    tokenizer = TamingTokenizer(config)
    picture = pixels_from_uint8(to_array(square(Image.open(place / "pictures" / "red-circle.png"), SIZE))[None])
    with torch.no_grad():  # codes of which some get used: half of them latents of a picture
        latents = tokenizer.quant_conv(tokenizer.encoder(picture))[0].flatten(1).T
        tokenizer.codes[: VOCAB // 2] = latents[::2]
    save_tokenizer(tokenizer, place / "taming")
    return place


def counted_slowly(folder: Path, pictures: Path) -> Counter[int]:
    tokenizer, _ = load_tokenizer(folder)
    total: Counter[int] = Counter()
    for path in pictures.glob("*.png"):
        pixels = pixels_from_uint8(to_array(square(Image.open(path), SIZE))[None])
        total.update(tokenizer.encode(pixels).flatten().tolist())
    return total


@pytest.mark.parametrize("part", ["model/tokenizer", "taming"])
def test_counted_codes_become_a_small_tokenizer_that_a_denoiser_trains_on(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    folder, listed, pictures = world / part, tmp_path / "codes.safetensors", str(world / "pictures")
    count = ["tokenizer", "count-codes", str(folder), "--images", pictures, "--output", str(listed)]
    assert main([*count, "--min-count", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    expected = counted_slowly(folder, world / "pictures")
    used = sorted(code for code, times in expected.items() if times >= 2)
    assert load_file(listed)["used"].tolist() == used
    assert load_file(listed)["counts"].tolist() == [expected[code] for code in range(VOCAB)]
    assert (said["kept"], said["vocab_size"], said["images"], said["skipped"]) == (len(used), VOCAB, 12, 0)
    assert said["share"] == pytest.approx(sum(expected[code] for code in used) / expected.total())
    assert 2 <= len(used) < VOCAB

    assert main(["convert", str(folder), str(tmp_path / "small"), "--codes", str(listed)]) == 0
    assert f"{len(used)} of {VOCAB} codes" in capsys.readouterr().out
    run = tiny_run(world)
    options = RunOptions(output=tmp_path / "run", device="cpu")
    with ImageIndex.open(world / "model" / "index") as index:
        sizes = f"vocab_size {VOCAB}, got one with {len(used)}: add --set denoiser.vocab_size={len(used)} --set schedule.voc"
        with pytest.raises(UsageError, match=sizes):
            train_denoiser(run, [pictures], index, options, tokenizer=tmp_path / "small")
        values = to_dict(run)
        values["denoiser"]["vocab_size"] = values["schedule"]["vocab_size"] = len(used)
        run = from_dict(DenoiserRun, values)
        train_denoiser(run, [pictures], index, options, tokenizer=tmp_path / "small")
    pipe = KnnDiffusion.from_pretrained(tmp_path / "run" / "model", index=world / "model" / "index", device="cpu")
    assert pipe.model.tokenizer.vocab_size == pipe.model.denoiser.config.vocab_size == len(used)
    (image,) = pipe("a red heart", k=2, seed=0).images
    assert image.size == (SIZE, SIZE)
    assert pipe.edit(image, "a hat", k=2, strength=0.5, seed=0).images[0].size == (SIZE, SIZE)
    pipe.save_pretrained(tmp_path / "saved")
    again = KnnDiffusion.from_pretrained(tmp_path / "saved", index=world / "model" / "index", device="cpu")
    assert again("a red heart", k=2, seed=0).images[0].tobytes() == image.tobytes()


def test_tokens_are_kept_apart_for_two_ways_to_choose_a_code(world: Path, tmp_path: Path) -> None:
    nearest, _ = load_tokenizer(world / "taming")
    product = TamingTokenizer(replace(nearest.config, quantizer="product"))
    product.load_state_dict(nearest.state_dict())
    one, other = (makers_of(made, encoder="e", dim=8) for made in (nearest, product))
    TokenFolder(tmp_path / "tokens", one)
    assert makers_of(nearest, encoder="e", dim=8) == one
    with pytest.raises(
        FingerprintError, match="tokens was made with the tokenizer .*: choose another folder, or go on"
    ):
        TokenFolder(tmp_path / "tokens", other)


def test_a_tokenizer_of_another_making_is_not_saved(tmp_path: Path) -> None:
    class Toy(torch.nn.Module):
        config, vocab_size, grid, codes, alpha = None, 2, 1, torch.eye(2), False

        def encode(self, pixels: torch.Tensor) -> torch.Tensor:
            return (pixels.mean((1, 2, 3)) > 0).long()[:, None]

        def decode(self, tokens: torch.Tensor) -> torch.Tensor:
            return tokens[:, :, None, None].expand(-1, 3, 4, 4).float()

    toy = Toy()
    assert isinstance(toy, Tokenizer)
    with pytest.raises(UsageError, match="expected a tokenizer of this package to save, got Toy: save it yourself"):
        save_tokenizer(toy, tmp_path / "x")


def test_images_that_cannot_be_read_are_counted_and_named(world: Path, tmp_path: Path) -> None:
    tokenizer, _ = load_tokenizer(world / "taming")
    draw_pictures(tmp_path / "some")
    (tmp_path / "some" / "broken.png").write_bytes(b"no picture")
    said: list[str] = []
    made = count_codes(tokenizer, [tmp_path / "some"], notice=said.append)
    assert (made.images, made.skipped, int(made.counts.sum())) == (12, 1, 12 * GRID**2)
    assert len(said) == 1
    assert said[0].startswith("skipped 1 of 13 pictures (first: ")
    with pytest.raises(UsageError, match="expected readable images, all 1 failed"):
        count_codes(tokenizer, [tmp_path / "some" / "broken.png"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "new"], "expected --images with folders"),
        (["--output", "new", "--images", "pictures", "--share", "0"], "expected --share above 0 and at most 1, got 0"),
        (["--output", "there", "--images", "pictures"], "expected a new file for --output, there is there already"),
        (["--output", "new", "--images", "pictures", "--share", "0.000001"], "at least 2 codes to keep, got 1 of"),
    ],
    ids=range(4),
)
def test_wrong_use_is_one_line(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    (tmp_path / "pictures").symlink_to(world / "pictures")
    (tmp_path / "there").touch()
    monkeypatch.chdir(tmp_path)
    assert main(["tokenizer", "count-codes", str(world / "taming"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
