"""What a denoiser of texts reads instead of neighbors: the states of CLIP's text tower (VQ-Diffusion; Table 1's baseline)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from knn_diffusion.checkpoint import load_weights_file
from knn_diffusion.errors import CheckpointError, UsageError
from knn_diffusion.models.encoders import JointEncoder
from knn_diffusion.models.transformers_encoder import TransformersEncoder

NULL_FILE = "null_condition.safetensors"
"""Beside a denoiser's weights: `y` [slots, dim], the condition that it was trained with for guidance."""
PADDING = 0
"""Token that fills short texts up, as VQ-Diffusion fills them; transformers' own CLIP repeats the end instead."""

States = Float[Tensor, "batch slots dim"]


def states_shape(encoder: JointEncoder) -> tuple[int, int]:
    """Number and width of a text's states. Raises: CheckpointError when the encoder is no CLIP."""
    clip = _clip(encoder)
    return clip.max_tokens, int(clip.model.config.text_config.hidden_size)


def text_states(encoder: JointEncoder, texts: Sequence[str]) -> States:
    """One unit vector for each place of each text, after the tower's final norm and not projected; texts may be empty.

    Raises: UsageError when a text is longer than the text tower reads; CheckpointError when the encoder is no CLIP.
    """
    clip = _clip(encoder)
    ids = [clip.tokenizer(text, verbose=False)["input_ids"] for text in texts]
    for text, one in zip(texts, ids, strict=True):
        if len(one) > clip.max_tokens:
            raise UsageError(
                f"expected a prompt of at most {clip.max_tokens} tokens with its markers, got {len(one)} ({text[:30]!r}...): "
                "shorten the prompt"
            )
    padded = torch.tensor([[*one, *[PADDING] * (clip.max_tokens - len(one))] for one in ids])
    with torch.inference_mode():
        states = clip.model.text_model(input_ids=padded.to(clip.model.device)).last_hidden_state
    return functional.normalize(states.float(), dim=-1).cpu()


def load_null(folder: Path) -> Float[Tensor, "slots dim"] | None:
    """The trained null condition beside a denoiser, None when there is none. Raises: CheckpointError when it is damaged."""
    if not (folder / NULL_FILE).is_file():
        return None
    tensors = load_weights_file(folder / NULL_FILE, None)
    if "y" not in tensors or tensors["y"].ndim != 2:
        raise CheckpointError(
            f"expected y [slots, dim] in {folder / NULL_FILE}, found none: convert the denoiser again"
        )
    return tensors["y"].float()


def _clip(encoder: JointEncoder) -> TransformersEncoder:
    if isinstance(encoder, TransformersEncoder) and encoder.model.config.model_type == "clip":
        return encoder
    raise CheckpointError(
        f"the denoiser reads the states of CLIP's text tower, the model holds the encoder {encoder.name}: put CLIP in its "
        "place (save_encoder)"
    )
