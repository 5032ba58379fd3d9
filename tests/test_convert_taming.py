"""Tokenizers of taming-transformers, in every wrapping, encode and decode as diffusers' VQModel does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert import changed, diffusers_transformer, microsoft_names, without
from torch import Tensor

from knn_diffusion.cli import main
from knn_diffusion.convert.codes import CODES_FILE, choose, read_used_codes, write_used_codes
from knn_diffusion.convert.part import convert
from knn_diffusion.errors import CheckpointError, ConfigError, UsageError
from knn_diffusion.models.taming import TamingConfig, TamingTokenizer
from knn_diffusion.models.tokenizers import load_tokenizer

SIZE, VOCAB = 32, 24
WIDTHS, ATTENTION, LATENT, CODE = (32, 32, 64), (1, 2), 6, 5


def vq_model(seed: int = 0, **changes: object) -> Any:
    from diffusers import VQModel

    torch.manual_seed(seed)
    levels = range(len(WIDTHS))
    sizes: dict[str, Any] = {
        "block_out_channels": WIDTHS,
        "down_block_types": tuple("AttnDownEncoderBlock2D" if n in ATTENTION else "DownEncoderBlock2D" for n in levels),
        "up_block_types": tuple(
            "AttnUpDecoderBlock2D" if n in ATTENTION else "UpDecoderBlock2D" for n in reversed(levels)
        ),
        "layers_per_block": 2,
        "latent_channels": LATENT,
        "num_vq_embeddings": VOCAB,
        "vq_embed_dim": CODE,
    }
    sizes |= changes
    model = VQModel(**sizes).eval()
    for parameter in model.parameters():  # biases and norms too: zeros and ones would hide an exchange
        torch.nn.init.normal_(parameter, std=0.15)
    some = latents_by(model, pictures(8)).flatten(0, 1)
    model.quantize.embedding.weight.data = (
        some[torch.randperm(len(some))[: sizes["num_vq_embeddings"]]] * 1.01
    )  # codes that get used
    return model


def pictures(count: int = 2) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5)) * 2 - 1


def latents_by(model: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return model.encode(pixels).latents.flatten(2).transpose(1, 2)


TAMING = {
    "down_blocks": "down",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "resnets": "block",
    "attentions": "attn",
    "downsamplers.0": "downsample",
    "upsamplers.0": "upsample",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
"""The published names, as diffusers' own script for this conversion pairs them."""


LLAMAGEN = TAMING | {
    "down_blocks": "conv_blocks",
    "up_blocks": "conv_blocks",
    "mid_block.resnets.0": "mid.0",
    "mid_block.attentions.0": "mid.1",
    "mid_block.resnets.1": "mid.2",
    "resnets": "res",
}
"""The same in LlamaGen, whose module lists are those of diffusers."""


def taming_names(state: dict[str, Tensor], names: dict[str, str] = TAMING) -> dict[str, Tensor]:
    def rename(name: str) -> str:
        if names is TAMING:
            name = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{len(WIDTHS) - 1 - int(found[1])}", name)
        for theirs in sorted(names, key=len, reverse=True):
            name = re.sub(rf"\.{re.escape(theirs)}\.", f".{names[theirs]}.", name)
        return name

    def square(name: str, value: Tensor) -> Tensor:
        return value[:, :, None, None] if re.search(r"\.(q|k|v|proj_out)\.weight$", name) else value

    return {rename(name): square(rename(name), value) for name, value in state.items()}


def gumbel(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same encoder and decoder around the codes of a GumbelVQ."""
    codes = state["quantize.embedding.weight"]
    kept = {name: value for name, value in state.items() if not name.startswith("quantize.")}
    return kept | {
        "quantize.proj.weight": codes[:, :, None, None],
        "quantize.proj.bias": -0.5 * codes.square().sum(1),
        "quantize.embed.weight": codes.flip(0),
    }


def lightning_file(path: Path, state: dict[str, Tensor], prefix: str = "") -> Path:
    """A checkpoint as trainers write it: losses beside the network, settings, an optimizer."""
    beside = {
        "loss.discriminator.main.0.weight": torch.randn(3),
        "loss.perceptual_loss.lin0.model.1.weight": torch.ones(1),
    }
    whole = {prefix + name: value for name, value in state.items()} | beside
    torch.save({"state_dict": whole, "epoch": 3, "callbacks": {Path: path}, "optimizer_states": [torch.ones(2)]}, path)
    return path


@pytest.fixture(scope="module")
def peer() -> Any:
    return vq_model()


@pytest.fixture(scope="module")
def published(peer: Any) -> dict[str, Tensor]:
    return taming_names(peer.state_dict())


def decoded_by(model: Any, codes: Tensor) -> Tensor:
    """Pixels of a grid of code vectors, [batch, seq, code_dim], by diffusers' decoder."""
    side = SIZE // 4
    with torch.no_grad():
        return model.decode(codes.transpose(1, 2).unflatten(2, (side, side)), force_not_quantize=True).sample.clamp(
            -1, 1
        )


def assert_same(folder: Path, model: Any) -> None:
    tokenizer, _ = load_tokenizer(folder)
    pixels = pictures()
    with torch.no_grad():
        quantized, _, (_, _, expected) = model.quantize(model.encode(pixels).latents)
    tokens = tokenizer.encode(pixels)
    assert torch.equal(tokens, expected.view(len(pixels), -1))
    assert len(tokens.unique()) > VOCAB // 2
    drawn = decoded_by(model, quantized.flatten(2).transpose(1, 2))
    assert drawn.std() > 0.2
    torch.testing.assert_close(tokenizer.decode(tokens), drawn, atol=1e-4, rtol=0)


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "model.module."])
def test_a_vqgan_encodes_and_decodes_as_diffusers_does(
    tmp_path: Path, peer: Any, published: dict[str, Tensor], prefix: str
) -> None:
    made = convert(lightning_file(tmp_path / "last.ckpt", published, prefix), tmp_path / "ours", image_size=SIZE)
    assert (made.part, made.recognized, made.also) == ("taming-tokenizer", "taming's VQGAN", None)
    assert_same(tmp_path / "ours", peer)


@pytest.mark.parametrize("safe", [True, False])
def test_a_vq_model_of_diffusers_becomes_the_same(tmp_path: Path, peer: Any, safe: bool) -> None:
    peer.save_pretrained(tmp_path / "pipeline" / "vqvae", safe_serialization=safe)
    made = convert(tmp_path / "pipeline", tmp_path / "ours", part="tokenizer", image_size=SIZE)
    assert made.recognized == "diffusers' VQModel"
    assert_same(tmp_path / "ours", peer)


def test_names_of_diffusers_before_2023_are_known(tmp_path: Path, peer: Any) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = peer.state_dict()
    for new, before in old.items():
        state = {name.replace(f".{new}.", f".{before}."): value for name, value in state.items()}
    assert sum("proj_attn" in name for name in state) == 2 * 12
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "x")
    convert(tmp_path / "x", tmp_path / "ours", image_size=SIZE)
    assert_same(tmp_path / "ours", peer)


def test_the_codec_inside_a_file_of_vq_diffusion_is_found(
    tmp_path: Path, peer: Any, published: dict[str, Tensor]
) -> None:
    """Encoder and decoder are apart there, both hold the codes; ITHQ's codes are a buffer beside their running means."""
    codes = published["quantize.embedding.weight"]
    quantize = {
        "quantize.embedding": codes,
        "quantize.cluster_size": torch.ones(VOCAB),
        "quantize.embedding_avg": codes,
    }
    halves = {
        "enc": {n: v for n, v in published.items() if n.startswith(("encoder", "quant_conv"))} | quantize,
        "dec": {n: v for n, v in published.items() if n.startswith(("decoder", "post_quant"))} | quantize,
    }
    whole = {f"content_codec.{half}.{name}": value for half, state in halves.items() for name, value in state.items()}
    torch.save({"model": whole, "ema": {}}, tmp_path / "x.pth")
    assert convert(tmp_path / "x.pth", tmp_path / "ours", image_size=SIZE).recognized == "taming's VQGAN"
    assert_same(tmp_path / "ours", peer)


def test_a_gumbel_vq_takes_the_most_probable_code_every_time(
    tmp_path: Path, peer: Any, published: dict[str, Tensor]
) -> None:
    state = gumbel(published)
    made = convert(lightning_file(tmp_path / "last.ckpt", state), tmp_path / "ours", image_size=SIZE)
    assert made.recognized == "taming's GumbelVQ"
    tokenizer, _ = load_tokenizer(tmp_path / "ours")
    logits = latents_by(peer, pictures()) @ state["quantize.proj.weight"][:, :, 0, 0].T + state["quantize.proj.bias"]
    tokens = tokenizer.encode(pictures())
    assert torch.equal(tokens, logits.argmax(-1))
    assert torch.equal(tokens, tokenizer.encode(pictures()))
    assert len(tokens.unique()) > VOCAB // 2
    expected = decoded_by(peer, state["quantize.embed.weight"][tokens])
    torch.testing.assert_close(tokenizer.decode(tokens), expected, atol=1e-4, rtol=0)


def assert_chosen_by(folder: Path, model: Any, logits: Tensor, codes: Tensor) -> None:
    tokenizer, _ = load_tokenizer(folder)
    tokens = tokenizer.encode(pictures())
    assert torch.equal(tokens, logits.argmax(-1))
    assert len(tokens.unique()) > 4
    torch.testing.assert_close(tokenizer.decode(tokens), decoded_by(model, codes[tokens]), atol=1e-4, rtol=0)


def test_llamagens_tokenizers_compare_directions(tmp_path: Path, peer: Any) -> None:
    state = taming_names(peer.state_dict(), LLAMAGEN)
    assert "decoder.conv_blocks.0.upsample.conv.weight" in state
    beside = {"quantize.codebook_used": torch.zeros(65536)}
    raw = {name: torch.randn_like(value) for name, value in state.items()}
    torch.save({"model": raw, "ema": state | beside, "steps": 1}, tmp_path / "vq_ds16_c2i.pt")
    made = convert(tmp_path / "vq_ds16_c2i.pt", tmp_path / "ours", image_size=SIZE)
    assert made.recognized == "LlamaGen's VQ"
    unit = torch.nn.functional.normalize(state["quantize.embedding.weight"], dim=1)
    logits = torch.nn.functional.normalize(latents_by(peer, pictures()), dim=-1) @ unit.T
    assert_chosen_by(tmp_path / "ours", peer, logits, unit)


def test_ibqs_averaged_weights_choose_by_inner_product_when_told_so(
    tmp_path: Path, peer: Any, published: dict[str, Tensor]
) -> None:
    centred = {"quant_conv.bias": published["quant_conv.bias"] - latents_by(peer, pictures()).mean((0, 1))}
    state = published | centred  # else one code is the longest in every direction there is
    raw = {name: torch.randn_like(value) for name, value in state.items()}
    means = {f"model_ema.{name.replace('.', '')}": value for name, value in state.items()}
    lightning_file(tmp_path / "x.ckpt", raw | means | {"model_ema.decay": torch.tensor(0.999)})
    with pytest.raises(
        UsageError, match="told how codes are chosen .* add --quantizer product for IBQ, --quantizer nearest"
    ):
        convert(tmp_path / "x.ckpt", tmp_path / "ours", image_size=SIZE)
    command = ["convert", str(tmp_path / "x.ckpt"), str(tmp_path / "ours"), "--image-size", str(SIZE)]
    assert main([*command, "--quantizer", "product"]) == 0
    codes = state["quantize.embedding.weight"]
    z = latents_by(peer, pictures()) - latents_by(peer, pictures()).mean((0, 1))
    assert_chosen_by(tmp_path / "ours", peer, z @ codes.T, codes)
    gumbel_file = lightning_file(tmp_path / "gumbel.ckpt", gumbel(published))
    with pytest.raises(UsageError, match="expected no --quantizer for taming's GumbelVQ"):
        convert(gumbel_file, tmp_path / "x", image_size=SIZE, product=True)


def test_a_checkpoint_with_both_parts_gives_the_one_that_is_named(
    tmp_path: Path, peer: Any, published: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    transformer = microsoft_names(diffusers_transformer().state_dict())
    both = {f"transformer.{name}": value for name, value in transformer.items()}
    both |= {f"content_codec.{name}": value for name, value in published.items()}
    torch.save({"model": both}, tmp_path / "x.pth")
    assert main(["convert", str(tmp_path / "x.pth"), str(tmp_path / "denoiser"), "--heads", "4"]) == 0
    said = capsys.readouterr().out
    assert "a denoiser of" in said
    assert "the checkpoint also holds a tokenizer: convert it with --part tokenizer" in said
    size = ["--image-size", str(SIZE)]
    assert main(["convert", str(tmp_path / "x.pth"), str(tmp_path / "ours"), "--part", "tokenizer", *size]) == 0
    assert "recognized taming's VQGAN: a taming-tokenizer of" in capsys.readouterr().out
    assert_same(tmp_path / "ours", peer)
    with pytest.raises(
        CheckpointError, match=r"expected VQ-Diffusion's transformer \(content_emb.emb.weight\), .* holds \d+ other"
    ):
        convert(lightning_file(tmp_path / "last.ckpt", published), tmp_path / "x", part="denoiser")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("encoder.mid.attn_1.q.bias"),
            r"VQGAN of 3 resolutions, got 1 tensors too few \(encoder.mid.attn_1.q.bias\) and 0 too many \(none\)",
        ),
        (without(".bias"), r"tensors too few \(\S+, \S+, \S+, …\) and 0 too many"),
        (without("quantize.embedding.weight"), r"got no quantize.embedding.weight: convert a VQGAN"),
        (without("down.1.block.0.conv1.weight"), r"got no encoder.down.1.block.0.conv1.weight"),
        (
            lambda state: state | {"encoder.down.0.block.0.temb_proj.weight": torch.ones(1)},
            r"0 tensors too few \(none\) and 1 too many \(state_dict.encoder.down.0.block.0.temb_proj.weight\)",
        ),
        (
            lambda state: state | {"encoder.down.999999999.x": torch.ones(1)},
            r"got no encoder.down.3.block.0.conv1.weight",
        ),
        (
            lambda state: state | {f"encoder.down.{n}.block.0.conv1.weight": torch.ones(32) for n in range(3, 15_000)},
            r"other sizes \(channel_multipliers must be one to 12 positive integers",
        ),
        (
            lambda state: state | {f"encoder.down.{'9' * 900}.block.0.conv1.weight": torch.ones(32)},
            r"0 tensors too few \(none\) and 1 too many",
        ),
        (
            changed("decoder.conv_out.weight", lambda value: value[:2]),
            r"expected state_dict.decoder.conv_out.weight of shape \[3, 32, 3, 3\], got \[2, 32, 3, 3\]",
        ),
        (
            changed("encoder.conv_in.weight", lambda value: value[:, :1]),
            r"of shape \[32, 3, 3, 3\], got \[32, 1, 3, 3\]",
        ),
        (
            changed("encoder.conv_in.weight", lambda value: value[:31]),
            r"other sizes \(channels must be a multiple of 32, got 31",
        ),
        (changed("encoder.conv_in.weight", lambda value: value[0, 0, 0, 0]), r"other sizes \(channels must be"),
        (
            changed("quantize.embedding.weight", lambda value: value[0]),
            r"other sizes \(code_dim must be at least 1, got 0",
        ),
        (
            changed("encoder.norm_out.bias", lambda value: value * float("nan")),
            r"got NaN or infinity in 1 tensors \(state_dict.encoder.norm_out.bias\): download the checkpoint again",
        ),
        (
            without("encoder.conv_in.weight"),
            r"expected VQ-Diffusion's transformer \(\S+\) or tokenizer \(encoder.conv_in.weight\), .* holds \d+ other tensors",
        ),
    ],
    ids=range(15),
)
def test_weights_that_do_not_fit_are_one_line(
    tmp_path: Path, published: dict[str, Tensor], change: Any, message: str
) -> None:
    lightning_file(tmp_path / "x.ckpt", change(published))
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(tmp_path / "x.ckpt", tmp_path / "ours", image_size=SIZE)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ours").exists()


def test_what_a_request_or_a_folder_of_diffusers_has_wrong_is_one_line(
    tmp_path: Path, peer: Any, published: dict[str, Tensor]
) -> None:
    file = lightning_file(tmp_path / "x.ckpt", published)
    with pytest.raises(ConfigError, match="image_size must be a multiple of 4, the side of a token, got 30"):
        convert(file, tmp_path / "ours", image_size=30)
    peer.save_pretrained(tmp_path / "theirs")
    config = tmp_path / "theirs" / "config.json"
    config.write_text(config.read_text().replace('"norm_num_groups": 32', '"norm_num_groups": 8'))
    with pytest.raises(CheckpointError, match="expected norm_num_groups to be 32 in .*config.json, got 8"):
        convert(tmp_path / "theirs", tmp_path / "ours", image_size=SIZE)


def labels_of(used: list[int]) -> Tensor:
    """VQ-Diffusion's map: the new number of every code, unused ones share that of code 0."""
    labels = torch.zeros(VOCAB, dtype=torch.int64)
    labels[torch.tensor(used)] = torch.arange(len(used))
    return labels


@pytest.mark.parametrize("kind", ["vqgan", "gumbel"])
def test_a_map_of_vq_diffusions_leaves_the_used_codes_under_new_numbers(
    tmp_path: Path, peer: Any, published: dict[str, Tensor], kind: str
) -> None:
    file = lightning_file(tmp_path / "x.ckpt", gumbel(published) if kind == "gumbel" else published)
    used = [0, 3, 4, 7, 11, 12, 19, 23]
    torch.save(labels_of(used), tmp_path / "map.pt")
    convert(file, tmp_path / "all", image_size=SIZE)
    made = convert(file, tmp_path / "some", image_size=SIZE, codes=tmp_path / "map.pt")
    assert made.recognized.endswith(", 8 of 24 codes")
    assert load_file(tmp_path / "some" / CODES_FILE)["used"].tolist() == used
    whole, _ = load_tokenizer(tmp_path / "all")
    small, _ = load_tokenizer(tmp_path / "some")
    assert (small.vocab_size, small.grid) == (len(used), SIZE // 4)
    new = torch.arange(64).remainder(8)[None]
    assert torch.equal(small.decode(new), whole.decode(torch.tensor(used)[new]))
    before, after = whole.encode(pictures()), torch.tensor(used)[small.encode(pictures())]
    kept = torch.isin(before, torch.tensor(used))
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(before[kept], after[kept])
    z = latents_by(peer, pictures())  # in both, logits or distances are those to the codes of the VQGAN
    nearest = torch.cdist(z, published["quantize.embedding.weight"][used]).argmin(-1)
    assert torch.equal(after, torch.tensor(used)[nearest])


def test_lists_of_codes_can_follow_each_other(tmp_path: Path, published: dict[str, Tensor]) -> None:
    file = lightning_file(tmp_path / "x.ckpt", published)
    write_used_codes(tmp_path / "first", torch.tensor([2, 3, 5, 7, 11, 13]))
    write_used_codes(tmp_path / "second", torch.tensor([1, 4]))
    convert(file, tmp_path / "six", image_size=SIZE, codes=tmp_path / "first")
    convert(tmp_path / "six", tmp_path / "two", codes=tmp_path / "second")
    assert load_file(tmp_path / "two" / CODES_FILE)["used"].tolist() == [3, 11]
    two, _ = load_tokenizer(tmp_path / "two")
    assert torch.equal(two.codes, published["quantize.embedding.weight"][[3, 11]])
    with pytest.raises(UsageError, match="is ours already: use it, or add --codes"):
        convert(tmp_path / "six", tmp_path / "x")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.arange(8).remainder(4), "holds 8 codes from 0 to 3, 4 of them different"),
        (torch.tensor([0, VOCAB]), "holds 2 codes from 0 to 24, 2 of them different"),
        (torch.tensor([-1, 2]), "holds 2 codes from -1 to 2"),
        (torch.tensor([5]), "holds 1 codes"),
        (torch.ones(VOCAB), "holds no vector of whole numbers"),
        (torch.ones(2, 2, dtype=torch.int64), "holds no vector of whole numbers"),
        (torch.arange(VOCAB) * 2, "holds 0 codes"),
    ],
    ids=range(7),
)
def test_a_map_that_cannot_be_is_one_line(tmp_path: Path, values: Tensor, message: str) -> None:
    torch.save(values, tmp_path / "map.pt")
    with pytest.raises(CheckpointError, match=message):
        read_used_codes(tmp_path / "map.pt", VOCAB)


def test_the_fewest_codes_that_make_up_a_share_are_chosen() -> None:
    counts = torch.tensor([5, 0, 1, 90, 3, 1])
    assert choose(counts).tolist() == [0, 2, 3, 4, 5]
    assert choose(counts, share=0.95).tolist() == [0, 3]
    assert choose(counts, share=0.951).tolist() == [0, 3, 4]
    assert choose(counts, min_count=3).tolist() == [0, 3, 4]
    with pytest.raises(UsageError, match=r"at least 2 codes to keep, got 1 of the 5 that were used: lower --min-count"):
        choose(counts, share=0.9)


def test_the_defaults_are_the_published_gumbel_vq() -> None:
    """Shapes of the OpenImages f8 model, as its configuration in taming-transformers gives them."""
    with torch.device("meta"):
        shapes = {name: list(value.shape) for name, value in TamingTokenizer(TamingConfig()).state_dict().items()}
    assert shapes["quantize.proj.weight"] == [8192, 256, 1, 1]
    assert shapes["encoder.down.3.attn.1.proj_out.weight"] == [512, 512, 1, 1]
    assert shapes["decoder.up.3.attn.2.norm.bias"] == [512]
    assert shapes["decoder.up.1.block.0.nin_shortcut.weight"] == [128, 256, 1, 1]
    assert "encoder.down.3.downsample.conv.weight" not in shapes
    assert "decoder.up.0.upsample.conv.weight" not in shapes
    assert TamingConfig().grid == 32
