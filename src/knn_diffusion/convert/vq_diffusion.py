"""VQ-Diffusion's transformer as our denoiser: the same network under other names (Gu et al. 2022, Tang et al. 2022).

Two spellings of its names are known: that of microsoft/VQ-Diffusion, which this module uses, and that of diffusers'
`Transformer2DModel`. What differs from our own denoiser:

    theirs                                        ours
    steps 0 … N-1                                 steps 1 … N
    AdaLN: embedding, SiLU, linear in each norm   the table of their results (`step_table`)
    biases in cross-attention                     `cross_attention_bias`
    GELU by a sigmoid                             `sigmoid_gelu`
    77 unit vectors, the states of a text         `plain_slots`

Codes, [MASK] as one past the last of them, rows and columns, scale before shift and the order of the heads are the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from knn_diffusion.convert.fit import check_names, check_values
from knn_diffusion.diffusion.process import Schedule
from knn_diffusion.errors import CheckpointError
from knn_diffusion.models.denoiser import DenoiserConfig

HEADS = 16
"""Of every published model; shapes do not tell it."""
DIFFUSERS = (
    (r"^content_emb\.", "latent_image_embedding."),
    (r"^blocks\.", "transformer_blocks."),
    (r"\.ln1\.", ".norm1."),
    (r"\.ln1_1\.", ".norm2."),
    (r"\.ln2\.", ".norm3."),
    (r"\.query\.", ".to_q."),
    (r"\.key\.", ".to_k."),
    (r"\.value\.", ".to_v."),
    (r"\.proj\.", ".to_out.0."),
    (r"\.mlp\.0\.", ".ff.net.0.proj."),
    (r"\.mlp\.2\.", ".ff.net.2."),
    (r"^to_logits\.0\.", "norm_out."),
    (r"^to_logits\.1\.", "out."),
)
"""What the parts of a name are called in diffusers."""
ANCHOR = "content_emb.emb.weight"
UNUSED = re.compile(r"blocks\.\d+\.attn[12]\.mask")
"""Tables that microsoft's files hold and its network never reads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The transformer inside a checkpoint.

    tensors   under microsoft's names
    spelled   what the file calls each of them
    layout    whose names these are, for people
    depth     number of blocks
    null      the condition that was trained for guidance, when the file holds one; never trained in models without it
    gammas    the file's own table of γ̄ at steps 1 … N, when it holds one
    """

    tensors: dict[str, Tensor]
    spelled: dict[str, str]
    layout: str
    depth: int
    null: Tensor | None
    gammas: Tensor | None


def find(tensors: Mapping[str, Tensor]) -> Found | None:
    """The transformer among the tensors of a checkpoint, None when there is none; averaged weights go before the raw ones."""
    for layout, rules in (("microsoft's VQ-Diffusion", ()), ("diffusers' VQ-Diffusion", DIFFUSERS)):
        anchor = spell(ANCHOR, rules)
        prefixes = [name.removesuffix(anchor) for name in tensors if name.endswith(anchor)]
        if prefixes:
            prefix = min(prefixes, key=lambda name: (not name.startswith("ema."), len(name)))
            return _under(prefix, tensors, layout, rules)
    return None


def spell(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    """A name of microsoft's under the rules of another spelling."""
    for pattern, other in rules:
        name = re.sub(pattern, other, name)
    return name


def _under(prefix: str, tensors: Mapping[str, Tensor], layout: str, rules: tuple[tuple[str, str], ...]) -> Found:
    inside = {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    numbers = [int(number) for name in inside for number in re.findall(r"^\w*blocks\.(\d+)\.", name)]
    depth = min(1 + max(numbers, default=0), len(inside))
    known = {spell(name, rules): name for name in _names(depth)}
    spelled = {known.get(name, name): full for name, full in inside.items() if not UNUSED.fullmatch(name)}
    around = prefix.removesuffix("transformer.")
    gammas = tensors.get(f"{around}log_cumprod_ct")
    averaged = ", averaged weights" if prefix.startswith("ema.") else ""
    return Found(
        tensors={name: tensors[full] for name, full in spelled.items()},
        spelled={name: prefix + spell(name, rules) for name in _names(depth)} | spelled,
        layout=layout + averaged,
        depth=depth,
        null=tensors.get(f"{around}empty_text_embed"),
        gammas=None if gammas is None else gammas.flatten()[:-1].exp(),
    )


def _names(depth: int) -> Iterator[str]:
    """Every tensor of the transformer."""
    layers = [f"attn{number}.{layer}" for number in (1, 2) for layer in ("query", "key", "value", "proj")]
    layers += ["ln1.linear", "ln1_1.linear", "ln2", "mlp.0", "mlp.2"]
    yield from (f"content_emb.{table}.weight" for table in ("emb", "height_emb", "width_emb"))
    for block in range(depth):
        yield from (f"blocks.{block}.{norm}.emb.weight" for norm in ("ln1", "ln1_1"))
        yield from (f"blocks.{block}.{layer}.{part}" for layer in layers for part in ("weight", "bias"))
    yield from (f"to_logits.{layer}.{part}" for layer in (0, 1) for part in ("weight", "bias"))


def denoiser_config(found: Found, *, heads: int, sigmoid_gelu: bool) -> DenoiserConfig:
    """The sizes of the transformer, every name and shape accounted for.

    Args: heads and sigmoid_gelu: what the tensors do not tell.

    Raises: CheckpointError naming up to three tensors that are missing, unexpected, of another shape or not finite;
    ConfigError when the heads do not divide the width.
    """
    tensors, spelled = found.tensors, found.spelled
    what = f"{found.layout} transformer of {found.depth} blocks"
    check_names(what, list(_names(found.depth)), tensors, spelled, "convert a text-to-image model")
    config = _sizes(tensors, found.depth, heads, sigmoid_gelu)
    check_values(_shapes(config), tensors, spelled)
    return config


def _sizes(tensors: Mapping[str, Tensor], depth: int, heads: int, sigmoid_gelu: bool) -> DenoiserConfig:
    def size(name: str, axis: int) -> int:
        shape = tensors[name].shape
        return shape[axis] if len(shape) == 2 else 1

    width = size(ANCHOR, 1)
    return DenoiserConfig(
        vocab_size=max(1, size(ANCHOR, 0) - 1),
        grid=size("content_emb.height_emb.weight", 0),
        width=width,
        depth=depth,
        heads=heads,
        condition_dim=size("blocks.0.attn2.key.weight", 1),
        num_steps=size("blocks.0.ln1.emb.weight", 0),
        mlp_ratio=max(1, size("blocks.0.mlp.0.weight", 0) // width),
        cross_attention_bias=True,
        step_table=True,
        sigmoid_gelu=sigmoid_gelu,
        plain_slots=True,
    )


def _shapes(config: DenoiserConfig) -> dict[str, tuple[int, ...]]:
    """What shape every tensor must have."""
    width, hidden, reads = config.width, config.mlp_ratio * config.width, config.condition_dim
    outputs = {"mlp.0": hidden, "linear": 2 * width, "to_logits.1": config.vocab_size}
    inputs = {"mlp.2": hidden, "attn2.key": reads, "attn2.value": reads}
    tables = {"content_emb.emb": config.vocab_size + 1, "ln1.emb": config.num_steps, "ln1_1.emb": config.num_steps}
    tables |= {"height_emb": config.grid, "width_emb": config.grid}

    def shape(name: str) -> tuple[int, ...]:
        layer, _, part = name.rpartition(".")

        def among(sizes: Mapping[str, int], otherwise: int) -> int:
            return next((size for end, size in sizes.items() if layer.endswith(end)), otherwise)

        if rows := among(tables, 0):
            return rows, width
        if part == "bias" or layer.endswith(("ln2", "to_logits.0")):
            return (among(outputs, width),)
        return among(outputs, width), among(inputs, width)

    return {name: shape(name) for name in _names(config.depth)}


def schedule_of(found: Found, config: DenoiserConfig) -> Schedule:
    """The noise schedule of every VQ-Diffusion model, the preset `released`.

    Raises: CheckpointError when the file holds another one.
    """
    schedule = Schedule(num_steps=config.num_steps, vocab_size=config.vocab_size, preset="released")
    ours, theirs = schedule.gamma_bar[1:], found.gammas
    if theirs is not None and (theirs.shape != ours.shape or not torch.allclose(theirs.double(), ours, atol=1e-5)):
        raise CheckpointError(
            "expected VQ-Diffusion's released noise schedule, the checkpoint holds another one: it cannot be converted"
        )
    return schedule


def denoiser_weights(found: Found, config: DenoiserConfig) -> dict[str, Tensor]:
    """The weights of `Denoiser(config)`, in float32."""
    theirs = {name: tensor.float() for name, tensor in found.tensors.items()}
    ours = {
        "token_table.weight": theirs[ANCHOR],
        "row_table": theirs["content_emb.height_emb.weight"][:, None],
        "column_table": theirs["content_emb.width_emb.weight"],
        "step_embedding.table": torch.stack([_step_rows(theirs, f"blocks.{d}") for d in range(config.depth)], dim=1),
    }
    for part in ("weight", "bias"):
        ours |= {f"head_norm.{part}": theirs[f"to_logits.0.{part}"], f"head.{part}": theirs[f"to_logits.1.{part}"]}
        for block in range(config.depth):
            sources = {
                "self_attention.query_key_value": ("attn1.query", "attn1.key", "attn1.value"),
                "self_attention.output": ("attn1.proj",),
                "cross_attention.query": ("attn2.query",),
                "cross_attention.key_value": ("attn2.key", "attn2.value"),
                "cross_attention.output": ("attn2.proj",),
                "mlp_norm": ("ln2",),
                "mlp_in": ("mlp.0",),
                "mlp_out": ("mlp.2",),
            }
            for target, layers in sources.items():
                joined = torch.cat([theirs[f"blocks.{block}.{layer}.{part}"] for layer in layers])
                ours[f"blocks.{block}.{target}.{part}"] = joined
    return ours


def _step_rows(theirs: Mapping[str, Tensor], block: str) -> Tensor:
    """What both norms of a block make of every step: [steps, 4, width], scale and shift of each."""
    rows = []
    for norm in (f"{block}.ln1", f"{block}.ln1_1"):
        embedded = functional.silu(theirs[f"{norm}.emb.weight"].double())
        made = functional.linear(
            embedded, theirs[f"{norm}.linear.weight"].double(), theirs[f"{norm}.linear.bias"].double()
        )
        rows += [half.float() for half in made.chunk(2, dim=1)]
    return torch.stack(rows, dim=1)
