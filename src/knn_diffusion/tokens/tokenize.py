"""Pictures to tokens, in batches of one size."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Integer
from PIL import Image

from knn_diffusion.checkpoint import weights_digest
from knn_diffusion.images import network_input, pixels_from_uint8
from knn_diffusion.models.tokenizer_protocol import Tokenizer
from knn_diffusion.tokens.examples import Makers, token_type

MOST_PIXELS, MOST_IMAGES = 2**20, 16
"""What a tokenizer sees at once: 16 images of 256 pixels, which take some gigabytes in a paper-sized network."""


class Tokenize:
    """A tokenizer as a function of pictures, which can be sent to other processes.

    Batches have one size, so that an image's tokens do not depend on its company.
    """

    def __init__(self, tokenizer: Tokenizer, at_once: int = MOST_IMAGES) -> None:
        """Args: at_once: images of a batch, at most."""
        self.tokenizer = tokenizer
        self.size, self.kind = tokenizer.config.image_size, token_type(tokenizer.vocab_size)
        self.batch = max(1, min(at_once, MOST_PIXELS // self.size**2))

    def to(self, device: torch.device) -> Tokenize:
        """Work on that device."""
        self.tokenizer.to(device)
        return self

    @torch.inference_mode()
    def __call__(self, images: Sequence[Image.Image]) -> Integer[np.ndarray, "images seq"]:
        """Return the codes of each image, framed as the tokenizer reads it, in the smallest integers that hold them."""
        device = next(self.tokenizer.parameters()).device
        made = np.empty((len(images), self.tokenizer.grid**2), self.kind)
        for start in range(0, len(images), self.batch):
            some, alpha = images[start : start + self.batch], self.tokenizer.alpha
            array = np.stack([network_input(image, self.size, alpha=alpha) for image in some])
            filled = np.concatenate([array, np.repeat(array[-1:], self.batch - len(array), axis=0)])
            tokens = self.tokenizer.encode(pixels_from_uint8(filled).to(device))
            made[start : start + len(array)] = tokens[: len(array)].cpu().numpy()
        return made


def makers_of(tokenizer: Tokenizer, *, encoder: str, dim: int) -> Makers:
    """What tokens and embeddings depend on besides the images.

    Args: encoder: fingerprint of the joint encoder.
    """
    parts = f"{weights_digest(tokenizer.state_dict())} {tokenizer.config}"  # a setting may say how a code is chosen
    return Makers(
        tokenizer=hashlib.sha256(parts.encode()).hexdigest(),
        seq=tokenizer.grid**2,
        vocab_size=tokenizer.vocab_size,
        encoder=encoder,
        dim=dim,
    )
