"""Layers that work on single tokens, before p × p of them are merged to a place and after it is unmerged again.

Axis words are those of `models.denoiser`, and `local_width` the channels of a token.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class LocalBlock(nn.Module):
    """A residual block over tokens and their eight neighbors: a convolution for each channel, then a small MLP.

    Its norm is over the channels of a token, so images do not mix. Tokens stay [batch, seq, channels], which seen as an image
    is channels-last: nothing is copied between the layers.
    """

    def __init__(self, width: int, ratio: int) -> None:
        """Args: ratio: hidden size of the MLP over `width`."""
        super().__init__()
        self.around = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Linear(width, ratio * width)
        self.outer = nn.Linear(ratio * width, width)

    def forward(self, tokens: Float[Tensor, "batch seq local_width"]) -> Float[Tensor, "batch seq local_width"]:
        """Add what a token's surroundings say of it."""
        grid = int(tokens.shape[1] ** 0.5)
        image = rearrange(tokens, "b (i j) c -> b c i j", i=grid)
        seen = rearrange(self.around(image), "b c i j -> b (i j) c")
        return tokens + self.outer(functional.gelu(self.inner(self.norm(seen))))


class LocalLayers(nn.Module):
    """What is known of single tokens goes around the transformer, and single tokens are predicted from it.

    Without these layers a place predicts its p × p tokens by themselves, from one vector: they do not agree with each other, nor
    across the border with tokens that are already drawn, and outlines fray. Here the last blocks see the drawn tokens
    themselves beside what the transformer says. The head then reads `local_width` channels for one token in place of `width`
    for p².

    Differs from the paper, whose transformer has p = 1 and no convolutions.
    """

    def __init__(self, width: int, patch_size: int, local_width: int, blocks: int, *, leader: bool) -> None:
        super().__init__()
        self.into = LocalBlock(local_width, 1)
        self.place_norm = nn.LayerNorm(width)
        self.unmerge = nn.Linear(width, patch_size**2 * local_width)
        self.leader = nn.Linear(local_width, local_width, bias=False) if leader else None
        self.out = nn.ModuleList([LocalBlock(local_width, 2) for _ in range(blocks)])

    def initialize_weights(self) -> None:
        """Blocks together add unit variance, the leader a little."""
        for chain in ([self.into], list(self.out)):
            for block in chain:
                assert isinstance(block, LocalBlock)
                nn.init.normal_(block.around.weight, std=block.around.weight[0].numel() ** -0.5)
                nn.init.normal_(block.outer.weight, std=(len(chain) * block.outer.in_features) ** -0.5)
        if self.leader is not None:
            nn.init.normal_(self.leader.weight, std=0.1 * self.leader.in_features**-0.5)

    def forward(
        self,
        h: Float[Tensor, "batch seq local_width"],
        tokens: Float[Tensor, "batch seq local_width"],
        leader: Float[Tensor, "batch seq local_width"] | None,
    ) -> Float[Tensor, "batch seq local_width"]:
        """What the head reads.

        Args:
            h: what the transformer says of each token.
            tokens: what went into the transformer.
            leader: tokens of the first neighbor, 0 where there is none, so that what is alike can be copied token by token.
        """
        h = h + tokens
        if self.leader is not None and leader is not None:
            h = h + self.leader(leader)
        for block in self.out:
            h = block(h)
        return h


def in_arithmetic(values: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """The values in the type of matrix products: a stream of a few blocks needs no more, and is half as long to move."""
    kind = values.device.type
    return values.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else values
