"""taming-transformers' image tokenizers, as other projects spell and wrap them (Esser et al. 2021).

The network is that of `models.taming`, which has taming's own names. Known besides are

    latent diffusion, taming's transformers   wrapped as `first_stage_model`
    VQ-Diffusion's codecs                     wrapped as `content_codec.enc` and `.dec`; ITHQ's codes are a buffer
    IBQ                                       averaged weights, names without dots; codes by inner product
    diffusers' `VQModel`                      another spelling
    LlamaGen                                  another spelling; codes of length 1
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from knn_diffusion.convert.fit import check_names, check_values, some
from knn_diffusion.errors import CheckpointError, ConfigError, UsageError
from knn_diffusion.models.taming import TamingConfig, TamingTokenizer

CURE = "convert a VQGAN of images"
LLAMAGEN = "LlamaGen's VQ"
ANCHOR = "encoder.conv_in.weight"
TABLE = "quantize.embedding.weight"
PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")
"""How the names of the network begin; what lies beside it (losses, discriminators, averages of another layout) is left."""
CODEC = re.compile(r"(^|\.)(?:enc|dec)\.(?=encoder\.|decoder\.|quantize\.|quant_conv\.|post_quant_conv\.)")
UNUSED = re.compile(r"quantize\.((embedding\.)?(cluster_size|embed(ding)?_avg)|codebook_used)")
"""Running means and counts that only training reads."""
AVERAGES = "model_ema."
SPELLINGS = (
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
    (r"^encoder\.conv_blocks\.", "encoder.down."),
    (r"\.res\.", ".block."),
    (r"\.mid\.0\.", ".mid.block_1."),
    (r"\.mid\.1\.", ".mid.attn_1."),
    (r"\.mid\.2\.", ".mid.block_2."),
    (r"\.(?:to_q|query)\.", ".q."),
    (r"\.(?:to_k|key)\.", ".k."),
    (r"\.(?:to_v|value)\.", ".v."),
    (r"\.(?:to_out\.0|proj_attn)\.", ".proj_out."),
)
"""What diffusers, before 2023 and since, and LlamaGen call the parts of a name."""
COARSEST_FIRST = r"decoder\.(?:up_blocks|conv_blocks)\.(\d{1,9})\."


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The tokenizer inside a checkpoint.

    tensors   under taming's names
    spelled   what the file calls each of them
    layout    whose names these are, for people
    averaged  whether they are running means of the weights, as IBQ keeps
    """

    tensors: dict[str, Tensor]
    spelled: dict[str, str]
    layout: str
    averaged: bool


def find(tensors: Mapping[str, Tensor]) -> Found | None:
    """The tokenizer among the tensors of a checkpoint, None when there is none.

    Averaged weights go before the raw ones; a tokenizer of conditions goes last.
    """
    plain = {CODEC.sub(r"\1", name): name for name in tensors}
    prefixes = [name.removesuffix(ANCHOR) for name in plain if f".{name}".endswith(f".{ANCHOR}")]
    if not prefixes:
        return None
    prefix = min(prefixes, key=lambda name: ("cond_stage" in name, not name.startswith("ema."), len(name)))
    inside = {name.removeprefix(prefix): full for name, full in plain.items() if name.startswith(prefix)}
    inside = {name: full for name, full in inside.items() if name.startswith(PARTS) and not UNUSED.fullmatch(name)}
    means = {name: f"{prefix}{AVERAGES}{name.replace('.', '')}" for name in inside}
    averaged = all(name in tensors for name in means.values())
    levels = len(_numbers(inside, COARSEST_FIRST))
    spelled = {_taming(name, levels): full for name, full in (means if averaged else inside).items()}
    if "quantize.embedding" in spelled:
        spelled[TABLE] = spelled.pop("quantize.embedding")
    found = {name: _square(name, tensors[full]) for name, full in spelled.items()}
    return Found(tensors=found, spelled=spelled, layout=_layout(inside), averaged=averaged)


def _layout(inside: Mapping[str, str]) -> str:
    if any(".conv_blocks." in name for name in inside):
        return LLAMAGEN
    if any(".mid_block." in name for name in inside):
        return "diffusers' VQModel"
    return "taming's GumbelVQ" if "quantize.proj.weight" in inside else "taming's VQGAN"


def _taming(name: str, levels: int) -> str:
    """A name as taming spells it, which counts the decoder's resolutions from the finest."""
    name = re.sub(COARSEST_FIRST, lambda found: f"decoder.up.{levels - 1 - int(found[1])}.", name)
    for pattern, other in SPELLINGS:
        name = re.sub(pattern, other, name)
    return name


def _square(name: str, tensor: Tensor) -> Tensor:
    """The weight of an attention's 1 × 1 convolution, which diffusers keeps as a matrix."""
    return tensor[..., None, None] if ".attn" in name and name.endswith(".weight") and tensor.ndim == 2 else tensor


def _numbers(names: Mapping[str, object], pattern: str) -> set[int]:
    return {int(found[1]) for name in names if (found := re.match(pattern, name))}


def tokenizer_config(found: Found, *, image_size: int, product: bool | None) -> TamingConfig:
    """The sizes of the network, every name and shape accounted for.

    Args: image_size and product: what the tensors do not tell, the side of the images in pixels and whether codes are
    chosen by inner product.

    Raises: CheckpointError naming up to three tensors that are missing, unexpected, of another shape or not finite;
    ConfigError when `image_size` is no multiple of a token's side; UsageError when `product` must be known, or cannot be.
    """
    config = replace(_sizes(found), image_size=image_size)
    if found.averaged and product is None:
        raise UsageError(
            "expected to be told how codes are chosen in a tokenizer with averaged weights, as IBQ has them: add --quantizer "
            "product for IBQ, --quantizer nearest for others"
        )
    if product is not None and config.quantizer == "gumbel":
        raise UsageError(f"expected no --quantizer for {found.layout}, which has logits of its own: leave it out")
    config = replace(config, quantizer="product") if product else config
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in TamingTokenizer(config).state_dict().items()}
    what = f"{found.layout} of {len(config.channel_multipliers)} resolutions"
    check_names(what, shapes, found.tensors, found.spelled, CURE)
    check_values(shapes, found.tensors, found.spelled)
    return config


def _sizes(found: Found) -> TamingConfig:
    """What names and shapes tell, for images of one token."""
    tensors = found.tensors
    levels = range(len(_numbers(tensors, r"encoder\.down\.(\d{1,9})\.")))
    table = "quantize.embed.weight" if "quantize.proj.weight" in tensors else TABLE
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
            blocks=len(_numbers(tensors, r"encoder\.down\.0\.block\.(\d{1,9})\.")),
            attention_levels=tuple(sorted(_numbers(tensors, r"encoder\.down\.(\d{1,9})\.attn\."))),
            quantizer="gumbel" if "quantize.proj.weight" in tensors else "nearest",
        )
    except ConfigError as error:
        raise CheckpointError(f"expected {found.layout}, got other sizes ({str(error)[:200]})") from None


def tokenizer_weights(found: Found) -> dict[str, Tensor]:
    """The weights of the network, in float32; LlamaGen's codes of length 1, so that the nearest one is the most alike."""
    weights = {name: tensor.float() for name, tensor in found.tensors.items()}
    if found.layout == LLAMAGEN:
        weights[TABLE] = functional.normalize(weights[TABLE], dim=1)
    return weights
