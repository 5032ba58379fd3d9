"""A model out of parts that were made one by one, and every way in which they do not fit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_convert import diffusers_transformer
from test_convert_taming import vq_model
from test_encoders import published
from test_text_model import DIM as TEXT_DIM
from test_text_model import GRID as TEXT_GRID
from test_text_model import VOCAB as TEXT_VOCAB
from tiny_hub import serving
from tiny_world import GRID, VOCAB, build_model, draw_pictures, same_pixels

from knn_diffusion import ImageIndex, KnnDiffusion
from knn_diffusion.assembly import Drawing, Parts, assemble
from knn_diffusion.checkpoint import save_part
from knn_diffusion.cli import main
from knn_diffusion.convert.part import convert
from knn_diffusion.errors import CheckpointError, FingerprintError, KnnDiffusionError, UsageError
from knn_diffusion.model_folder import BUNDLES, load_denoiser, read_pipeline_file
from knn_diffusion.models.denoiser import Denoiser
from knn_diffusion.models.encoders import load_encoder
from knn_diffusion.models.tokenizer import VQGAN
from knn_diffusion.models.tokenizers import load_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its index; and a denoiser and a tokenizer of VQ-Diffusion's, converted, with a CLIP."""
    place = tmp_path_factory.mktemp("world")
    build_model(place / "whole", draw_pictures(place / "pictures"))
    diffusers_transformer(sample_size=TEXT_GRID, cross_attention_dim=TEXT_DIM).save_pretrained(
        place / "theirs" / "transformer"
    )
    vq_model(num_vq_embeddings=TEXT_VOCAB).save_pretrained(place / "theirs" / "vqvae")
    convert(place / "theirs", place / "text" / "denoiser")
    convert(place / "theirs", place / "text" / "tokenizer", part="tokenizer", image_size=4 * TEXT_GRID)
    published(place / "clip", "clip")
    return place


def parts_of(world: Path, **others: str | Path | None) -> Parts:
    whole = world / "whole"
    parts = Parts(encoder=whole / "encoder", tokenizer=whole / "tokenizer", denoiser=whole / "denoiser")
    return replace(parts, **others)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_parts_and_an_index_become_the_model_they_are_from(world: Path, tmp_path: Path) -> None:
    made = assemble(tmp_path / "mine", parts_of(world, index=world / "whole" / "index"))
    assert (made.name, made.images, made.reads_text, made.k) == ("mine", 12, False, 3)
    there, here = (KnnDiffusion.from_pretrained(one, device="cpu") for one in (world / "whole", tmp_path / "mine"))
    assert same_pixels(there("a red cat", seed=2).images[0], here("a red cat", seed=2).images[0])
    assert not here.index.read_only
    before, now = read_pipeline_file(world / "whole"), read_pipeline_file(tmp_path / "mine")
    assert (now.parts, now.sampler, now.k, now.query_weight) == (
        before.parts,
        before.sampler,
        before.k,
        before.query_weight,
    )
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "license: mit" in card
    assert "- encoder: tiny" not in card
    assert "| tokenizer | trained by this package |" in card
    assert str(tmp_path) not in card


def test_what_lies_in_the_folder_already_is_never_replaced(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "whole" / "index", tmp_path / "mine" / "index")
    (tmp_path / "mine" / "index" / "cache").mkdir(exist_ok=True)
    (tmp_path / "mine" / "index" / "cache" / "cells").write_bytes(b"took hours")
    before = contents(tmp_path / "mine" / "index")
    with pytest.raises(
        UsageError, match="expected one index, .*mine holds one already: leave out --index, or choose another"
    ):
        assemble(tmp_path / "mine", parts_of(world, index=world / "whole" / "index"))
    assert contents(tmp_path / "mine") == {f"index/{name}": content for name, content in before.items()}
    assert assemble(tmp_path / "mine", parts_of(world)).images == 12
    assert contents(tmp_path / "mine" / "index") == before


def test_a_model_may_be_named_for_its_parts_and_go_without_an_index(world: Path, tmp_path: Path) -> None:
    whole = world / "whole"
    made = assemble(tmp_path / "mine", Parts(encoder=whole, tokenizer=whole, denoiser=whole), name="other")
    assert (made.name, made.images) == ("other", None)
    assert (
        KnnDiffusion.from_pretrained(tmp_path / "mine", index=whole / "index", device="cpu")("a cat").model == "other"
    )


def test_without_an_encoder_it_is_that_of_the_index(world: Path, tmp_path: Path) -> None:
    assemble(tmp_path / "mine", parts_of(world, encoder=None, index=world / "whole" / "index"))
    assert KnnDiffusion.from_pretrained(tmp_path / "mine").model.encoder.name == "tiny"


def test_converted_parts_become_a_model_that_draws_from_texts(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(world / "text", tmp_path / "ithq")
    command = ["assemble", str(tmp_path / "ithq"), "--encoder", str(world / "clip"), "--license", "apache-2.0"]
    assert main([*command, "--steps", "4", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["reads_text"], said["images"], said["sampler"]["num_steps"]) == (True, None, 4)
    assert (said["sampler"]["order"], said["sampler"]["guidance_scale"]) == ("ancestral", 5.0)
    card = (tmp_path / "ithq" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "diffusers' VQ-Diffusion, converted from diffusion_pytorch_model.safetensors (SHA-256 " in card
    assert (tmp_path / "ithq" / "denoiser" / "README.md").is_file()
    drawn = ["generate", "a red cat", "--model", str(tmp_path / "ithq"), "--output", str(tmp_path / "drawn"), "--json"]
    assert main([*drawn, "--device", "cpu"]) == 0
    assert len(json.loads(capsys.readouterr().out)["images"]) == 1


def test_a_converted_tokenizer_serves_a_denoiser_that_reads_neighbors(world: Path, tmp_path: Path) -> None:
    """As when a denoiser was trained here on a tokenizer of others."""
    denoiser, _, facts = load_denoiser(world / "whole" / "denoiser")
    config = replace(denoiser.config, vocab_size=TEXT_VOCAB, grid=TEXT_GRID)
    facts["schedule"]["vocab_size"] = TEXT_VOCAB
    save_part(tmp_path / "part", kind="denoiser", config=config, weights=Denoiser(config).state_dict(), extra=facts)
    parts = parts_of(
        world, tokenizer=world / "text" / "tokenizer", denoiser=tmp_path / "part", index=world / "whole" / "index"
    )
    made = assemble(tmp_path / "mine", parts, drawing=Drawing(k=2, num_steps=3, order="halton"))
    assert (made.sampler.num_steps, made.k) == (3, 2)
    without = assemble(tmp_path / "without", parts, drawing=Drawing(k=0, num_steps=3, order="halton"))
    assert without.k == 0
    out = KnnDiffusion.from_pretrained(tmp_path / "mine", device="cpu")("a cat")
    assert (out.images[0].size, len(out.neighbors)) == ((4 * TEXT_GRID,) * 2, 2)
    assert "license: unknown" in (tmp_path / "mine" / "README.md").read_text()


def test_parts_and_an_index_of_the_hub_are_fetched(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with serving(tmp_path, monkeypatch) as hub:
        shutil.copytree(world / "whole", hub.folder("me/whole"))
        made = assemble(tmp_path / "mine", parts_of(world, denoiser="me/whole", index="me/whole"))
    assert made.images == 12
    with ImageIndex.open(tmp_path / "mine" / "index") as index:
        assert not index.read_only


# What does not fit


def test_each_misfit_is_a_line_and_nothing_is_written(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = build_model(tmp_path / "other", draw_pictures(tmp_path / "pictures"), seed=9)
    whole, text = world / "whole", world / "text"
    cases: list[tuple[dict[str, str | Path | None], type[KnnDiffusionError], str]] = [
        ({"encoder": other / "encoder"}, FingerprintError, "the denoiser was trained with the encoder"),
        ({"index": other / "index"}, FingerprintError, r"was built with tiny .*, the encoder is tiny"),
        ({"tokenizer": text / "tokenizer"}, CheckpointError, rf"a vocabulary of {VOCAB}, got {TEXT_VOCAB}"),
        ({"denoiser": text / "denoiser"}, CheckpointError, "reads the states of CLIP's text tower, the model holds"),
        (
            {"denoiser": text / "denoiser", "index": whole / "index"},
            UsageError,
            "expected no index, the denoiser in .*",
        ),
        ({"tokenizer": None}, UsageError, r"expected a tokenizer for the model, got none .*: add --tokenizer FOLDER"),
        ({"denoiser": None}, UsageError, r"expected a denoiser for the model, got none .*: add --denoiser FOLDER"),
        ({"encoder": None}, UsageError, r"expected an encoder for the model, got none .*: add --encoder NAME"),
        ({"denoiser": whole / "tokenizer"}, CheckpointError, "expected a denoiser in .*, found a tokenizer"),
        (
            {"tokenizer": tmp_path / "nowhere"},
            CheckpointError,
            r"expected a tokenizer \(a folder with config.json\), or",
        ),
        ({"encoder": tmp_path / "nowhere"}, UsageError, "expected an encoder "),
    ]
    for changes, error, message in cases:
        with pytest.raises(error, match=message) as raised:
            assemble(tmp_path / "mine", parts_of(world, **changes))
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "mine").exists()
    with pytest.raises(UsageError, match="expected at most 8 steps, as trained, got 9"):
        assemble(tmp_path / "mine", parts_of(world), drawing=Drawing(num_steps=9))
    assert main(["assemble", str(tmp_path / "mine"), "--denoiser", str(whole)]) == 2
    assert "add --tokenizer FOLDER" in capsys.readouterr().err


def test_another_grid_is_noticed(world: Path, tmp_path: Path) -> None:
    tokenizer, _ = load_tokenizer(world / "whole" / "tokenizer")
    config = replace(tokenizer.config, image_size=32, grid=2 * GRID)  # type: ignore[type-var]
    save_part(tmp_path / "part", kind="tokenizer", config=config, weights=VQGAN(config).state_dict())
    with pytest.raises(CheckpointError, match=f"a grid of side {GRID}, got {2 * GRID}: combine parts trained together"):
        assemble(tmp_path / "mine", parts_of(world, tokenizer=tmp_path / "part"))


def test_a_denoiser_that_knows_its_codes_notices_those_of_another(tmp_path: Path) -> None:
    bundled = BUNDLES / "stickers"
    made = assemble(tmp_path / "mine", Parts(encoder="stickers", tokenizer="stickers", denoiser="stickers"))
    assert made.parts == read_pipeline_file(bundled).parts
    tokenizer, _ = load_tokenizer(bundled / "tokenizer")
    weights = tokenizer.state_dict()
    (codes,) = [name for name, value in weights.items() if value.shape == tokenizer.codes.shape]
    weights[codes] = weights[codes][torch.randperm(len(weights[codes]))]
    save_part(tmp_path / "part", kind="tokenizer", config=tokenizer.config, weights=weights)
    with pytest.raises(
        FingerprintError, match="those of this one .* are others: name the tokenizer it was trained with"
    ):
        assemble(tmp_path / "other", Parts(encoder="stickers", tokenizer=tmp_path / "part", denoiser="stickers"))


def test_a_place_with_other_things_stays_as_it_is(world: Path, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    shutil.copytree(world / "whole", tmp_path / "whole")
    for place, message in (
        ("notes", "holds other files"),
        ("file", "holds other files"),
        ("whole", "is a model already"),
    ):
        before = contents(tmp_path)
        with pytest.raises(UsageError, match=message):
            assemble(tmp_path / place, parts_of(world))
        assert contents(tmp_path) == before


def test_a_damaged_part_leaves_the_others_as_they_are(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "text", tmp_path / "mine")
    weights = tmp_path / "mine" / "tokenizer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    before = contents(tmp_path / "mine")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        assemble(tmp_path / "mine", Parts(encoder=world / "clip"))
    assert contents(tmp_path / "mine") == before


def test_the_encoder_that_is_written_has_the_fingerprint_of_the_one_that_was_named(world: Path, tmp_path: Path) -> None:
    assemble(
        tmp_path / "mine",
        Parts(encoder=world / "clip", tokenizer=world / "text" / "tokenizer", denoiser=world / "text"),
    )
    assert load_encoder(tmp_path / "mine" / "encoder").fingerprint == load_encoder(world / "clip").fingerprint
