"""How much memory a forward and backward pass of the denoiser takes beside the run's state, from its configuration alone.

Counted are the tensors that autograd keeps, and what is alive with them where most is: while the gradient of the logits is made,
or, with recomputed activations, while a block is computed again. Everything of a row or a few numbers a place is left out.
Tests hold the count to what tensors really take on a CPU, within a twentieth.
"""

from __future__ import annotations

from dataclasses import dataclass

from knn_diffusion.models.cross_attention import KEYS_PER_VALUE
from knn_diffusion.models.denoiser import DenoiserConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Activations:
    """Bytes of one pass: a part whatever the number of examples, and one for each that is computed at once.

    made, forward     where the forward pass needs most
    kept, backward    where the backward pass does
    """

    made: int
    forward: int
    kept: int
    backward: int

    def of(self, examples: int) -> int:
        """The most that is alive at once."""
        return max(self.made + examples * self.forward, self.kept + examples * self.backward)

    def fitting(self, room: int) -> int:
        """Of how many examples a pass fits into so many bytes; 0 or less when none does."""
        return min((room - self.made) // self.forward, (room - self.kept) // self.backward)


def denoiser_activations(
    config: DenoiserConfig, neighbors: int, *, bfloat16: bool, recomputed: bool, replaces: bool
) -> Activations:
    """What a step of training the denoiser takes at once.

    Args:
        neighbors: of each example.
        bfloat16: whether matrix products are computed in it; float32 otherwise.
        recomputed: whether each block keeps its input alone.
        replaces: whether the schedule replaces codes in earnest, which the loss sums over.
    """
    product = 2 if bfloat16 else 4  # bytes of what a matrix product reads and writes; everything between is float32
    stream, logits = config.places * config.width, config.seq * config.vocab_size
    pairs = config.heads * (1 + neighbors)
    block = _block(config, pairs, product)
    head = stream * (4 + product)
    loss = logits * (12 if replaces else 4)  # log p; with replaced codes also p and what its logarithm is taken of
    kept = config.depth * (4 * stream if recomputed else block) + head + loss
    kept += config.depth * (2 * config.width * (pairs + neighbors + 1) * product + 6 * config.width * 4)
    kept += _maps(config, neighbors, product) + config.places * config.depth * config.heads * 4
    if config.patch_size > 1:
        kept += config.patch_size * stream * product
    gradients = logits * (8 if replaces else 12)
    if recomputed:
        wide = config.mlp_ratio * product * (2 if config.sigmoid_gelu else 1)
        gradients = max(gradients, block + max(16, wide) * stream - head - loss)
    copies, rows = 2 * _matrices(config) if bfloat16 else 0, _traits(config, bfloat16)
    return Activations(
        made=copies + rows,
        forward=kept + logits * (8 if replaces else 4),
        kept=rows + (0 if recomputed else copies),
        backward=kept + gradients,
    )


def _block(config: DenoiserConfig, pairs: int, product: int) -> int:
    """Three norms keep their input and two of them their output; products keep what goes in, attention also what comes out."""
    weights = pairs * (4 if product == 4 else 6)  # of cross-attention: float32, and what the product reads of them
    wide = config.mlp_ratio * config.width * product * (3 if config.sigmoid_gelu else 2)
    return config.places * (config.width * (3 * 4 + 2 * 4 + 7 * product) + wide + weights)


def _maps(config: DenoiserConfig, neighbors: int, product: int) -> int:
    """The maps of all slots, and what their two readers keep."""
    if not config.map_width:
        return 0
    channels, slots = config.map_width + config.map_width // KEYS_PER_VALUE, 1 + neighbors
    reader = config.width * (4 + product) + channels * product + config.heads * slots * (4 + product)
    return config.places * (slots * channels * product + len({0, config.depth // 2}) * reader)


def _traits(config: DenoiserConfig, bfloat16: bool) -> int:
    """The rows that are made of the codes' traits, for the token table and the head."""
    rows = config.vocab_size * config.width * (config.patch_size**2 + 1) if config.code_dim else 0
    return rows * (6 if bfloat16 else 4)


def _matrices(config: DenoiserConfig) -> int:
    """Weights that matrix products read, each of which has a copy in bfloat16 during the forward pass."""
    width, dim = config.width, config.condition_dim
    block = width * width * (4 + 2 + 2 * config.mlp_ratio) + 2 * width * dim
    step = 0 if config.step_table else 4 * width * config.step_width
    maps = dim * config.places * (config.map_width + config.map_width // KEYS_PER_VALUE)
    return config.depth * (block + step) + config.patch_size**2 * config.vocab_size * width + maps
