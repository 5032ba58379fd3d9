"""How much memory a forward and backward pass of the denoiser takes beside the run's state, from its configuration alone.

Counted are the tensors that autograd keeps, and what is alive with them where most is: while the gradient of the logits is made,
or, with recomputed activations, while a block is computed again. Everything of a row or a few numbers a place is left out.
Tests hold the count to what tensors really take on a CPU, within a twentieth.
"""

from __future__ import annotations

from dataclasses import dataclass

from knn_diffusion.models.copying import COMPARED
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
    config: DenoiserConfig,
    neighbors: int,
    *,
    bfloat16: bool,
    recomputed: bool,
    replaces: bool,
    masks_only: bool = False,
) -> Activations:
    """What a step of training the denoiser takes at once.

    Args:
        neighbors: of each example.
        bfloat16: whether matrix products are computed in it; float32 otherwise.
        recomputed: whether each block keeps its input alone.
        replaces: whether the schedule replaces codes in earnest, which the loss sums over.
        masks_only: whether it never does, so that the loss looks up one number of each token; counted is a step at which all
            tokens are masked.
    """
    product = 2 if bfloat16 else 4  # bytes of what a matrix product reads and writes; everything between is float32
    stream, logits = config.places * config.width, config.seq * config.vocab_size
    pairs = config.heads * (1 + neighbors)
    block = _block(config, pairs, product)
    head = stream * (4 + product)
    after = _after(config, product)
    loss = logits * (12 if replaces else 4)  # log p; with replaced codes also p and what its logarithm is taken of
    kept = config.depth * (4 * stream if recomputed else block) + head + after + loss
    kept += config.depth * (2 * config.width * (pairs + neighbors + 1) * product + 6 * config.width * 4)
    kept += _maps(config, neighbors, product) + config.places * config.depth * config.heads * 4
    kept += _grids(config, product) + _offers(config, product)
    if config.local_width:
        kept += _before(config, product)
    elif config.patch_size > 1:
        kept += config.patch_size * stream * product
    gradients = logits * (8 if replaces or masks_only else 12)
    if recomputed:
        wide = config.mlp_ratio * product * (2 if config.sigmoid_gelu else 1)
        gradients = max(gradients, block + max(16, wide) * stream - head - after - loss)
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


def _before(config: DenoiserConfig, product: int) -> int:
    """The block of single tokens before the transformer, for the image and each grid, and what is merged of it."""
    return 6 * (1 + config.grid_neighbors) * config.seq * config.local_width * product


def _after(config: DenoiserConfig, product: int) -> int:
    """The blocks of single tokens after it, the leader's tokens, and the head's norm."""
    each = 7 * config.local_blocks + 2 + min(1, config.grid_neighbors)
    return each * config.seq * config.local_width * product


def _grids(config: DenoiserConfig, product: int) -> int:
    """Keys and values of the grids and the norm before them, and what their readers keep."""
    stream, cells = config.places * config.width, config.grid_neighbors * config.places
    reader = stream * (4 + 3 * product) + config.heads * config.places * cells * product
    return 4 * cells * config.width * product + config.grid_layers * reader


def _offers(config: DenoiserConfig, product: int) -> int:
    """What may be copied to each token: an offer's code, its key and whether it is there."""
    return config.seq * config.grid_neighbors * config.copy_window**2 * (8 + (COMPARED + 1) * product)


def _traits(config: DenoiserConfig, bfloat16: bool) -> int:
    """The rows that are made of the codes' traits, for the token table and the head."""
    widths = 2 * config.local_width or config.width * (config.patch_size**2 + 1)
    rows = config.vocab_size * widths if config.code_dim else 0
    return rows * (6 if bfloat16 else 4)


def _matrices(config: DenoiserConfig) -> int:
    """Weights that matrix products read, each of which has a copy in bfloat16 during the forward pass."""
    width, dim = config.width, config.condition_dim
    block = width * width * (4 + 2 + 2 * config.mlp_ratio) + 2 * width * dim
    step = 0 if config.step_table else 4 * width * config.step_width
    maps = dim * config.places * (config.map_width + config.map_width // KEYS_PER_VALUE)
    head = (
        config.patch_size**2 * width * (2 * config.local_width or config.vocab_size)
    )  # merged and unmerged, or predicted
    head += config.local_width * (config.vocab_size + config.local_width * (2 + 4 * config.local_blocks))
    grids = 2 * width * width * (min(1, config.grid_neighbors) + config.grid_layers)
    return config.depth * (block + step) + head + maps + grids
