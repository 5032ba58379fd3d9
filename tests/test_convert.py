"""Checkpoints of VQ-Diffusion become denoisers that predict the same; whatever does not fit is one line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from knn_diffusion.cli import main
from knn_diffusion.convert.part import convert
from knn_diffusion.diffusion.process import Schedule, posterior
from knn_diffusion.errors import CheckpointError, ConfigError, UsageError
from knn_diffusion.model_folder import load_denoiser
from knn_diffusion.models.text_states import NULL_FILE
from knn_diffusion.shapes import Condition

pytestmark = pytest.mark.filterwarnings("ignore:`Transformer2DModelOutput` is deprecated:FutureWarning")

VOCAB, GRID, WIDTH, DEPTH, HEADS, DIM, STEPS, STATES = 13, 4, 32, 3, 4, 24, 100, 77


def diffusers_transformer(**changes: object) -> Any:
    from diffusers import Transformer2DModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_attention_heads": HEADS,
        "attention_head_dim": WIDTH // HEADS,
        "num_layers": DEPTH,
        "cross_attention_dim": DIM,
        "attention_bias": True,
        "num_vector_embeds": VOCAB + 1,
        "sample_size": GRID,
        "num_embeds_ada_norm": STEPS,
        "norm_type": "ada_norm",
        "activation_fn": "geglu-approximate",
    }
    model = Transformer2DModel(**(sizes | changes)).eval()
    for parameter in model.parameters():  # biases and norms too: zeros and ones would hide an exchange
        torch.nn.init.normal_(parameter, std=0.3)
    return model


MICROSOFT = {
    "latent_image_embedding": "content_emb",
    "transformer_blocks": "blocks",
    "norm1": "ln1",
    "norm2": "ln1_1",
    "norm3": "ln2",
    "to_q": "query",
    "to_k": "key",
    "to_v": "value",
    "to_out.0": "proj",
    "ff.net.0.proj": "mlp.0",
    "ff.net.2": "mlp.2",
    "norm_out": "to_logits.0",
    "out": "to_logits.1",
}
"""The published names, as diffusers' own script for this conversion pairs them."""


def microsoft_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    def rename(name: str) -> str:
        for theirs in sorted(MICROSOFT, key=len, reverse=True):
            name = re.sub(rf"(^|\.){re.escape(theirs)}\.", lambda found: f"{found[1]}{MICROSOFT[theirs]}.", name)  # noqa: B023
        return name

    return {rename(name): value for name, value in state.items()}


def microsoft_file(path: Path, model: Any, **extra: object) -> Path:
    """A training checkpoint: raw weights beside the averaged ones, buffers, settings, an optimizer."""
    inner = microsoft_names(model.state_dict())
    masks = {f"blocks.{block}.attn2.mask": torch.ones(1, 1, GRID**2, GRID**2) for block in range(DEPTH)}
    schedule = Schedule(num_steps=STEPS, vocab_size=VOCAB)
    around = {
        "log_cumprod_ct": torch.cat([schedule.gamma_bar[1:], torch.zeros(1)]).log().float(),
        "empty_text_embed": torch.randn(STATES, DIM, dtype=torch.float64),
        "condition_emb.token_embedding.weight": torch.randn(5, DIM),
    }
    whole = {f"transformer.{name}": value for name, value in (inner | masks).items()} | around
    raw = {f"transformer.{name}": torch.randn_like(value.float()) for name, value in whole.items()}
    raw |= {"content_codec.enc.weight": torch.randn(2)}
    saved = {"last_epoch": 3, "model": raw, "ema": whole, "optimizer": {"lr": 1e-4}, "args": path} | extra
    torch.save(saved, path)
    return path


@pytest.fixture(scope="module")
def peer() -> Any:
    return diffusers_transformer()


def theirs(model: Any, x_n: Tensor, states: Tensor, step: int) -> Tensor:
    """The raw logits of diffusers' transformer, [batch, seq, vocab]."""
    kept: list[Tensor] = []
    hook = model.out.register_forward_hook(lambda module, arguments, output: kept.append(output))
    with torch.no_grad():
        model(x_n, encoder_hidden_states=states, timestep=torch.tensor(step - 1))
    hook.remove()
    return kept[0]


def inputs(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_n = torch.randint(0, VOCAB + 1, (2, GRID**2), generator=generator)
    states = torch.nn.functional.normalize(torch.randn(2, STATES, DIM, generator=generator), dim=-1)
    return x_n, states


def assert_same(folder: Path, model: Any) -> None:
    denoiser, schedule, _ = load_denoiser(folder)
    assert schedule == Schedule(num_steps=STEPS, vocab_size=VOCAB, preset="released")
    for seed, step in enumerate((1, 2, 37, 99, 100)):
        x_n, states = inputs(seed)
        condition = Condition(y=states, present=torch.ones(2, STATES, dtype=torch.bool))
        ours = denoiser(x_n, torch.full((2,), step), condition)
        expected = theirs(model, x_n, states, step)
        assert expected.std() > 0.3
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("safe", [True, False])
def test_a_transformer_of_diffusers_predicts_the_same(tmp_path: Path, peer: Any, safe: bool) -> None:
    peer.save_pretrained(tmp_path / "theirs", safe_serialization=safe)
    made = convert(tmp_path / "theirs", tmp_path / "ours")
    assert made.recognized == "diffusers' VQ-Diffusion"
    assert_same(tmp_path / "ours", peer)


def test_a_file_of_microsofts_predicts_the_same_by_its_averaged_weights(tmp_path: Path, peer: Any) -> None:
    made = convert(microsoft_file(tmp_path / "theirs.pth", peer), tmp_path / "ours", heads=HEADS)
    assert made.recognized == "microsoft's VQ-Diffusion, averaged weights"
    assert_same(tmp_path / "ours", peer)
    saved = torch.load(tmp_path / "theirs.pth", weights_only=False)["ema"]["empty_text_embed"]
    assert torch.equal(load_file(tmp_path / "ours" / NULL_FILE)["y"], saved.float())


def test_averaged_weights_go_before_raw_ones_wherever_they_lie(tmp_path: Path, peer: Any) -> None:
    state = microsoft_names(peer.state_dict())
    raw = {name: torch.randn_like(value) for name, value in state.items()}
    torch.save({"m": raw, "ema": {"transformer": state}}, tmp_path / "x")
    convert(tmp_path / "x", tmp_path / "ours", heads=HEADS)
    assert_same(tmp_path / "ours", peer)


@pytest.mark.parametrize("prefix", ["", "transformer.transformer.", "module.transformer.transformer."])
def test_a_bare_state_dict_in_the_old_form_will_do(tmp_path: Path, peer: Any, prefix: str) -> None:
    state = {prefix + name: value for name, value in microsoft_names(peer.state_dict()).items()}
    torch.save(state, tmp_path / "x", _use_new_zipfile_serialization=False)
    made = convert(tmp_path / "x", tmp_path / "ours", heads=HEADS)
    assert (made.recognized, made.null) == ("microsoft's VQ-Diffusion", False)
    assert_same(tmp_path / "ours", peer)


def test_the_exact_gelu_of_diffusers_is_kept(tmp_path: Path) -> None:
    model = diffusers_transformer(activation_fn="gelu")
    model.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    assert_same(tmp_path / "ours", model)


@pytest.mark.parametrize("step", [1, 2, 50, 100])
def test_one_step_of_the_posterior_is_that_of_diffusers(tmp_path: Path, peer: Any, step: int) -> None:
    from diffusers.schedulers import VQDiffusionScheduler

    peer.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    denoiser, schedule, _ = load_denoiser(tmp_path / "ours")
    x_n, states = inputs(step)
    with torch.no_grad():
        log_p = peer(x_n, encoder_hidden_states=states, timestep=torch.tensor(step - 1)).sample
    oracle = VQDiffusionScheduler(num_vec_classes=VOCAB + 1, num_train_timesteps=STEPS)
    logits = denoiser(x_n, torch.full((2,), step), Condition(y=states, present=torch.ones(2, STATES, dtype=torch.bool)))
    torch.testing.assert_close(logits.log_softmax(-1), log_p.transpose(1, 2), atol=1e-4, rtol=0)
    if step == 1:  # the oracle's step to a clean image is the prediction itself
        return
    expected = oracle.q_posterior(log_p, x_n, torch.tensor(step - 1)).transpose(1, 2).exp()
    stride = schedule.stride(torch.tensor([step]), torch.tensor([step - 1]))
    torch.testing.assert_close(posterior(schedule, logits, x_n, stride).float(), expected, atol=3e-4, rtol=0)


def test_a_pipeline_of_diffusers_gives_its_transformer_and_null_condition(tmp_path: Path, peer: Any) -> None:
    pipeline = tmp_path / "pipeline"
    peer.save_pretrained(pipeline / "transformer")
    null = torch.randn(STATES, DIM)
    embeddings = pipeline / "learned_classifier_free_sampling_embeddings"
    embeddings.mkdir()
    torch.save({"embeddings": null}, embeddings / "diffusion_pytorch_model.bin")
    (pipeline / "scheduler").mkdir()
    scheduler = pipeline / "scheduler" / "scheduler_config.json"
    scheduler.write_text('{"alpha_cum_start": 0.99999, "gamma_cum_end": 0.99999}')
    assert convert(pipeline, tmp_path / "ours").null
    assert torch.equal(load_file(tmp_path / "ours" / NULL_FILE)["y"], null)
    assert_same(tmp_path / "ours", peer)
    scheduler.write_text('{"alpha_cum_start": 0.99999, "gamma_cum_end": 0.9}')
    with pytest.raises(CheckpointError, match="released noise schedule, .* has another gamma_cum_end"):
        convert(pipeline, tmp_path / "other")


def test_the_command_says_what_it_recognised_and_where_it_came_from(
    tmp_path: Path, peer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = microsoft_file(tmp_path / "theirs.pth", peer)
    assert main(["convert", str(path), str(tmp_path / "ours"), "--heads", "4", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["recognized"] == "microsoft's VQ-Diffusion, averaged weights"
    assert (said["part"], said["source"], said["null"]) == ("denoiser", "theirs.pth", True)
    stored = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert stored["extra"]["origin"]["sha256"] == said["sha256"]
    assert "converted from `theirs.pth`" in (tmp_path / "ours" / "README.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours", "theirs.pth"]
    assert main(["convert", str(path), str(tmp_path / "ours"), "--heads", "4"]) == 2
    assert "expected a new or empty folder to write to" in capsys.readouterr().err
    assert main(["convert", str(path), str(tmp_path / "again"), "--heads", "4"]) == 0
    assert "recognized microsoft's VQ-Diffusion, averaged weights: a denoiser of" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "nothing"), str(tmp_path / "x")]) == 1
    assert "cannot be read" in capsys.readouterr().err


def without(*names: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: {name: value for name, value in state.items() if not name.endswith(names)}


def changed(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda state: state | {name: make(state[name])}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("blocks.1.attn1.query.bias"),
            r"transformer of 3 blocks, got 1 tensors too few \(blocks.1.attn1.query.bias\) and 0 too many \(none\)",
        ),
        (without(".bias"), r"got 41 tensors too few \(\S+, \S+, \S+, …\) and 0 too many"),
        (
            lambda state: state | {f"blocks.0.mlp.conv{n}.weight": torch.ones(1) for n in range(5)},
            r"5 too many \(blocks.0.mlp.conv0.weight, blocks.0.mlp.conv1.weight, blocks.0.mlp.conv2.weight, …\)",
        ),
        (lambda state: state | {"blocks.999999999.x": torch.ones(1)}, r"too few \(blocks.3.ln1.emb.weight, "),
        (
            changed("blocks.2.mlp.0.weight", lambda value: value[:-1]),
            r"expected blocks.2.mlp.0.weight of shape \[128, 32\], got \[127, 32\]: the checkpoint is of another",
        ),
        (
            changed("to_logits.1.weight", lambda value: torch.cat([value, value[:1]])),
            r"expected to_logits.1.weight of shape \[13, 32\], got \[14, 32\]",
        ),
        (changed("content_emb.emb.weight", lambda value: value[0]), r"of shape \[\d, 1\], got \[32\]"),
        (
            changed("blocks.1.ln2.bias", lambda value: value * float("nan")),
            r"got NaN or infinity in 1 tensors \(blocks.1.ln2.bias\): download the checkpoint again",
        ),
        (
            without("content_emb.emb.weight"),
            r"expected VQ-Diffusion's transformer \(content_emb.emb.weight\) or tokenizer .* holds 90 other tensors \(blocks",
        ),
    ],
    ids=range(9),
)
def test_weights_that_do_not_fit_are_one_line(tmp_path: Path, peer: Any, change: Any, message: str) -> None:
    torch.save(change(microsoft_names(peer.state_dict())), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(tmp_path / "x.pth", tmp_path / "ours", heads=1)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ours").exists()


def test_names_in_errors_are_those_of_the_file(tmp_path: Path, peer: Any) -> None:
    state = peer.state_dict()
    del state["transformer_blocks.2.ff.net.0.proj.bias"]
    torch.save({"state_dict": state}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=r"few \(state_dict.transformer_blocks.2.ff.net.0.proj.bias\)"):
        convert(tmp_path / "x.bin", tmp_path / "ours")


def test_heads_another_schedule_and_a_broken_null_are_noticed(tmp_path: Path, peer: Any) -> None:
    path = microsoft_file(tmp_path / "x.pth", peer)
    with pytest.raises(ConfigError, match="heads must be a divisor of width 32, got 5"):
        convert(path, tmp_path / "ours", heads=5)
    whole = torch.load(path, weights_only=False)["ema"]
    microsoft_file(path, peer, ema=whole | {"log_cumprod_ct": torch.zeros(STEPS + 1)})
    with pytest.raises(CheckpointError, match="released noise schedule, the checkpoint holds another one"):
        convert(path, tmp_path / "ours")
    microsoft_file(path, peer, ema=whole | {"empty_text_embed": torch.ones(STATES, DIM + 1)})
    with pytest.raises(CheckpointError, match=r"null condition of finite 24-d slots, got \[77, 25\]"):
        convert(path, tmp_path / "ours")


def test_folders_of_other_models_are_one_line(tmp_path: Path, peer: Any) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="expected config.json and diffusion_pytorch_model.safetensors or"):
        convert(tmp_path / "empty", tmp_path / "ours")
    peer.save_pretrained(tmp_path / "theirs")
    config = tmp_path / "theirs" / "config.json"
    config.write_text(config.read_text().replace("geglu-approximate", "geglu"))
    with pytest.raises(
        CheckpointError, match="expected activation_fn to be geglu-approximate or gelu in .*, got geglu"
    ):
        convert(tmp_path / "theirs", tmp_path / "ours")
    with pytest.raises(UsageError, match="holds files: choose another name"):
        convert(tmp_path / "theirs", tmp_path / "theirs")
