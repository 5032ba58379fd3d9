"""VQ-Diffusion's models whole: converted denoiser and tokenizer with CLIP's text tower, drawn with as with any other."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_convert import diffusers_transformer
from test_convert_taming import vq_model
from test_encoders import published
from tiny_world import tiny_encoder
from torch import Tensor

from knn_diffusion import KnnDiffusion
from knn_diffusion.cli import main
from knn_diffusion.convert.part import convert
from knn_diffusion.diffusion.plan import SamplerConfig
from knn_diffusion.diffusion.sampling import sample
from knn_diffusion.errors import CheckpointError, UsageError
from knn_diffusion.model_folder import check_fit, load_model, write_pipeline_file
from knn_diffusion.models.cross_attention import PreparedCondition
from knn_diffusion.models.encoders import load_encoder, save_encoder
from knn_diffusion.models.text_states import NULL_FILE, text_states
from knn_diffusion.randomness import generator_for
from knn_diffusion.shapes import Condition

VOCAB, GRID, STATES, DIM = 13, 8, 12, 8
SAMPLER = SamplerConfig(num_steps=4, order="ancestral", guidance_scale=3.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of diffusers, and the model that its parts become."""
    place = tmp_path_factory.mktemp("world")
    theirs = place / "theirs"
    diffusers_transformer(sample_size=GRID, cross_attention_dim=DIM).save_pretrained(theirs / "transformer")
    vq_model(num_vq_embeddings=VOCAB).save_pretrained(theirs / "vqvae")
    (theirs / "learned_classifier_free_sampling_embeddings").mkdir()
    null = {"embeddings": torch.randn(STATES, DIM)}
    save_file(null, theirs / "learned_classifier_free_sampling_embeddings" / "diffusion_pytorch_model.safetensors")
    convert(theirs, place / "model" / "denoiser")
    convert(theirs, place / "model" / "tokenizer", part="tokenizer", image_size=4 * GRID)
    save_encoder(load_encoder(published(place / "clip", "clip")), place / "model" / "encoder")
    write_pipeline_file(place / "model", name="ours", sampler=SAMPLER)
    return place


def states_by_transformers(folder: Path, text: str) -> Tensor:
    """The way of diffusers' pipeline: padded with token 0, the last hidden state, each of length 1."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tower = transformers.CLIPTextModel.from_pretrained(folder).eval()
    assert tokenizer.pad_token_id == 0
    inputs = tokenizer(text, padding="max_length", max_length=STATES, return_tensors="pt").input_ids
    with torch.no_grad():
        states = tower(inputs)[0]
    return states / states.norm(dim=-1, keepdim=True)


def test_the_states_of_a_text_are_those_that_vq_diffusion_reads(world: Path) -> None:
    encoder = load_encoder(world / "clip")
    for text in ("a red cat", ""):
        got = text_states(encoder, [text])
        assert got.shape == (1, STATES, DIM)
        torch.testing.assert_close(got, states_by_transformers(world / "clip", text), atol=1e-5, rtol=0)
    with pytest.raises(UsageError, match="expected a prompt of at most 12 tokens with its markers, got 22"):
        text_states(encoder, ["cat " * 20])


@pytest.mark.parametrize("trained_null", [True, False])
def test_a_prompt_is_drawn_from_its_states_and_guided_by_the_null_condition(
    world: Path, tmp_path: Path, trained_null: bool
) -> None:
    model = load_model(world / "model")
    assert model.reads_text
    assert model.null is not None
    model = model if trained_null else replace(model, null=None)
    pipe = KnnDiffusion(model, device="cpu")
    out = pipe("a red cat", num_images_per_prompt=2, seed=3)
    assert (len(out.neighbors), out.shortfall, out.k, out.images[0].size) == (0, 0, 0, (32, 32))

    states = states_by_transformers(world / "clip", "a red cat")
    null = model.null[None] if trained_null and model.null is not None else states_by_transformers(world / "clip", "")
    present = torch.ones(1, STATES, dtype=torch.bool)
    given, nothing = (pipe.denoiser.prepare(Condition(y=y, present=present)) for y in (states, null))
    tokens = sample(
        pipe.denoiser,
        model.schedule,
        given,
        PreparedCondition.cat([given, nothing]),
        config=SAMPLER,
        grid=GRID,
        generators=[generator_for(3, 0)],
    )
    assert pipe.decode(tokens)[0].tobytes() == out.images[0].tobytes()
    assert out.images[0].tobytes() != pipe("a blue hat", seed=3).images[0].tobytes()


def test_such_a_model_edits_and_is_saved_as_any_other(world: Path, tmp_path: Path) -> None:
    pipe = KnnDiffusion.from_pretrained(world / "model", device="cpu")
    (image,) = pipe("a red cat", seed=0).images
    assert pipe.edit(image, "a hat", strength=0.5, seed=0).images[0].tobytes() != image.tobytes()
    pipe.save_pretrained(tmp_path / "copied")
    KnnDiffusion(replace(pipe.model, folder=None), device="cpu").save_pretrained(tmp_path / "written")
    for name in ("copied", "written"):
        again = KnnDiffusion.from_pretrained(tmp_path / name, device="cpu")
        assert again("a red cat", seed=0).images[0].tobytes() == image.tobytes()


def test_neighbors_and_other_encoders_are_refused_in_a_line(world: Path, tmp_path: Path) -> None:
    pipe = KnnDiffusion.from_pretrained(world / "model", device="cpu")
    with pytest.raises(UsageError, match="expected no k, ours reads the text and no neighbors: leave it out"):
        pipe("a cat", k=3)
    with pytest.raises(
        CheckpointError, match="reads the states of CLIP's text tower, the model holds the encoder tiny"
    ):
        check_fit(replace(pipe.model, encoder=tiny_encoder()), None)
    convert(world / "theirs", tmp_path / "model" / "denoiser")
    save_file({"y": torch.zeros(STATES + 1, DIM)}, tmp_path / "model" / "denoiser" / NULL_FILE)
    for part in ("encoder", "tokenizer"):
        (tmp_path / "model" / part).symlink_to(world / "model" / part)
    write_pipeline_file(tmp_path / "model", name="x", sampler=SAMPLER)
    with pytest.raises(CheckpointError, match=r"a null condition of shape \[12, 8\], got \[13, 8\]"):
        load_model(tmp_path / "model")


def test_the_command_line_draws_with_it(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "a red cat", "--model", str(world / "model"), "--output", str(tmp_path / "drawn"), "--json"]
    assert main([*command, "--device", "cpu"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["neighbors"], said["shortfall"], said["steps"], len(said["images"])) == ([], 0, 4, 1)
