"""taming-transformers' image tokenizers, as other projects spell and wrap them (Esser et al. 2021).

The network is that of `models.taming`, which has taming's own names. Known besides are the wrappings of latent diffusion and
of taming's transformers (`first_stage_model`), those of VQ-Diffusion (`content_codec.enc` and `.dec`; the codes of its ITHQ
model are a buffer), and the spelling of diffusers' `VQModel`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from knn_diffusion.convert.fit import check_names, check_values, some
from knn_diffusion.errors import CheckpointError, ConfigError
from knn_diffusion.models.taming import TamingConfig, TamingTokenizer

CURE = "convert a VQGAN of images"
ANCHOR = "encoder.conv_in.weight"
PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
"""How the names of the network begin; what lies beside it (losses, discriminators, averages of another layout) is left."""
CODEC = re.compile(r"(^|\.)(?:enc|dec)\.(?=encoder\.|decoder\.|quantize\.|quant_conv\.|post_quant_conv\.)")
UNUSED = re.compile(r"quantize\.(embedding\.)?(cluster_size|embed(ding)?_avg)")
"""Running means that only training reads."""
DIFFUSERS = (
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.down_blocks\.", ".down."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.(?:to_q|query)\.", ".q."),
    (r"\.(?:to_k|key)\.", ".k."),
    (r"\.(?:to_v|value)\.", ".v."),
    (r"\.(?:to_out\.0|proj_attn)\.", ".proj_out."),
)
"""What diffusers calls the parts of a name, before 2023 and since; its `up_blocks` count from the coarsest resolution."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The tokenizer inside a checkpoint.

    tensors   under taming's names
    spelled   what the file calls each of them
    layout    whose names these are, for people
    """

    tensors: dict[str, Tensor]
    spelled: dict[str, str]
    layout: str


def find(tensors: Mapping[str, Tensor]) -> Found | None:
    """The tokenizer among the tensors of a checkpoint, None when there is none; one of conditions goes last."""
    plain = {CODEC.sub(r"\1", name): name for name in tensors}
    prefixes = [name.removesuffix(ANCHOR) for name in plain if f".{name}".endswith(f".{ANCHOR}")]
    if not prefixes:
        return None
    prefix = min(prefixes, key=lambda name: ("cond_stage" in name, len(name)))
    inside = {name.removeprefix(prefix): full for name, full in plain.items() if name.startswith(prefix)}
    inside = {name: full for name, full in inside.items() if name.startswith(PARTS) and not UNUSED.fullmatch(name)}
    theirs = any(".mid_block." in name for name in inside)
    levels = len(_numbers(inside, r"decoder\.up_blocks\.(\d+)\."))
    spelled = {_taming(name, levels) if theirs else name: full for name, full in inside.items()}
    if "quantize.embedding" in spelled:
        spelled["quantize.embedding.weight"] = spelled.pop("quantize.embedding")
    kind = "GumbelVQ" if "quantize.proj.weight" in spelled else "VQGAN"
    layout = "diffusers' VQModel" if theirs else f"taming's {kind}"
    found = {name: _square(name, tensors[full]) for name, full in spelled.items()}
    return Found(tensors=found, spelled=spelled, layout=layout)


def _taming(name: str, levels: int) -> str:
    """A name of diffusers' as taming spells it."""
    name = re.sub(r"\.up_blocks\.(\d+)\.", lambda found: f".up.{levels - 1 - int(found[1])}.", name)
    for pattern, other in DIFFUSERS:
        name = re.sub(pattern, other, name)
    return name


def _square(name: str, tensor: Tensor) -> Tensor:
    """The weight of an attention's 1 × 1 convolution, which diffusers keeps as a matrix."""
    return tensor[..., None, None] if ".attn" in name and name.endswith(".weight") and tensor.ndim == 2 else tensor


def _numbers(names: Mapping[str, object], pattern: str) -> set[int]:
    return {int(found[1]) for name in names if (found := re.match(pattern, name))}


def tokenizer_config(found: Found, *, image_size: int) -> TamingConfig:
    """The sizes of the network, every name and shape accounted for.

    Args: image_size: side of the images in pixels, which the tensors do not tell.

    Raises: CheckpointError naming up to three tensors that are missing, unexpected, of another shape or not finite;
    ConfigError when `image_size` is no multiple of a token's side.
    """
    config = replace(_sizes(found), image_size=image_size)
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in TamingTokenizer(config).state_dict().items()}
    what = f"{found.layout} of {len(config.channel_multipliers)} resolutions"
    check_names(what, shapes, found.tensors, found.spelled, CURE)
    check_values(shapes, found.tensors, found.spelled)
    return config


def _sizes(found: Found) -> TamingConfig:
    """What names and shapes tell, for images of one token."""
    tensors = found.tensors
    levels = range(len(_numbers(tensors, r"encoder\.down\.(\d+)\.")))
    table = "quantize.embed.weight" if "quantize.proj.weight" in tensors else "quantize.embedding.weight"
    firsts = [f"encoder.down.{level}.block.0.conv1.weight" for level in levels]
    missing = [name for name in (*firsts, "encoder.conv_out.weight", table) if name not in tensors]
    if missing or not levels:
        raise CheckpointError(
            f"expected {found.layout}, got no {some(missing or ['encoder.down.0.block.0.conv1.weight'])}: {CURE}"
        )

    def size(name: str, axis: int = 0) -> int:
        shape = tensors[name].shape
        return shape[axis] if len(shape) > axis else 0

    channels = size(ANCHOR)
    try:
        return TamingConfig(
            image_size=2 ** (len(levels) - 1),
            vocab_size=size(table),
            code_dim=size(table, 1),
            latent_dim=size("encoder.conv_out.weight"),
            channels=channels,
            channel_multipliers=tuple(size(name) // max(1, channels) for name in firsts),
            blocks=len(_numbers(tensors, r"encoder\.down\.0\.block\.(\d+)\.")),
            attention_levels=tuple(sorted(_numbers(tensors, r"encoder\.down\.(\d+)\.attn\."))),
            quantizer="gumbel" if "quantize.proj.weight" in tensors else "nearest",
        )
    except ConfigError as error:
        raise CheckpointError(f"expected {found.layout}, got other sizes ({error})") from None


def tokenizer_weights(found: Found) -> dict[str, Tensor]:
    """The weights of the network, in float32."""
    return {name: tensor.float() for name, tensor in found.tensors.items()}
