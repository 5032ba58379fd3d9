"""The paper's transformer (A.2): it sees noised tokens x_n, the step n and y, and predicts x_0.

    tokens + row + column ─▶ depth × [ AdaLN(n) → self-attention
                                       AdaLN(n) → cross-attention to y
                                       LayerNorm → MLP ] ─▶ LayerNorm ─▶ logits over the vocabulary

With `map_width` each slot of y is also laid out over the places, and before the first and the middle block a place reads
its own cell of these maps. With `local_width` layers over single tokens stand around the transformer, and with
`grid_neighbors` it reads the first neighbors' tokens too, and with `copy_window` it may point at them. The paper has none of
these; what they are for stands at `SlotMaps`, `LocalLayers`, `GridAttention` and `CopyHead`.

Axis words beyond the legend of `shapes`: `depth` blocks; `places` positions of the transformer, (grid / patch_size)²;
`pairs` (head, slot), slots fastest; `step_width` the hidden size of the step's embedding.
"""

from __future__ import annotations

from dataclasses import fields
from math import sqrt
from typing import cast

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from knn_diffusion.config import config, require
from knn_diffusion.errors import FingerprintError, UsageError
from knn_diffusion.models.attention import attend
from knn_diffusion.models.code_traits import CodeTraits
from knn_diffusion.models.copying import CopyHead, Offers
from knn_diffusion.models.cross_attention import (
    KEYS_PER_VALUE,
    CrossAttention,
    MapAttention,
    PreparedCondition,
    SlotMaps,
)
from knn_diffusion.models.local_layers import LocalLayers, in_arithmetic
from knn_diffusion.models.neighbor_grids import GridAttention, GridReader, Grids
from knn_diffusion.models.step_norm import StepEmbedding, StepTable, adaptive_norm
from knn_diffusion.shapes import Condition, Logits, Steps, Tokens


@config
class DenoiserConfig:
    """Size of the transformer, and what it is trained to read.

    vocab_size            codes of the tokenizer, V; the mask id is V
    grid                  tokens along one side of the image
    width, depth, heads   hidden size, number of blocks, attention heads; heads divides width
    condition_dim         width of the joint embedding space H
    num_steps             N of the schedule, which sets the scale of the step's embedding
    mlp_ratio             hidden size of the MLP over width
    patch_size            p × p tokens share one place of the transformer; divides grid; 1 is the paper's
    step_width            hidden size of the step's embedding: AdaLN needs 4 · width · step_width weights per block
    query_dim             how many of the query's coordinates are read, the first ones: those that a text can fill; 0 for all
    code_dim              width of the tokenizer's codes, when the denoiser is to know them (see `CodeTraits`); 0 is the paper's
    map_width             channels of the map that each slot of y is laid out to, a multiple of 4 · heads; 0 is the paper's
    local_width           channels of a single token in layers around the transformer (see `LocalLayers`); 0 is the paper's
    local_blocks          blocks of such layers after the transformer, at least 1 with local_width
    grid_neighbors        of how many neighbors, the first ones, the tokens are read too (see `GridAttention`); 0 is the paper's
    grid_layers           before how many of the blocks, spread evenly; at least 1 with grid_neighbors
    copy_window           codes of these grids can be pointed at (see `CopyHead`) in a window of w × w tokens, w odd; 0 is the paper's
    cross_attention_bias  biases as in VQ-Diffusion; then the null condition no longer removes cross-attention
    step_table            every norm learns its scale and shift for each step by itself, as in VQ-Diffusion; `step_width` says nothing
    sigmoid_gelu          the MLP's GELU is x · σ(1.702 x), as in VQ-Diffusion
    plain_slots           y is read as it comes, every slot alike, as VQ-Diffusion reads the 77 states of a text
    """

    vocab_size: int
    grid: int
    width: int
    depth: int
    heads: int
    condition_dim: int
    num_steps: int
    mlp_ratio: int = 4
    patch_size: int = 1
    step_width: int = 64
    query_dim: int = 0
    code_dim: int = 0
    map_width: int = 0
    local_width: int = 0
    local_blocks: int = 0
    grid_neighbors: int = 0
    grid_layers: int = 0
    copy_window: int = 0
    cross_attention_bias: bool = False
    step_table: bool = False
    sigmoid_gelu: bool = False
    plain_slots: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.default == 0 else 1
            require(isinstance(value, bool) or value >= least, field.name, value, f"at least {least}")
        require(self.width % self.heads == 0, "heads", self.heads, f"a divisor of width {self.width}")
        require(self.grid % self.patch_size == 0, "patch_size", self.patch_size, f"a divisor of grid {self.grid}")
        whole = self.width % self.patch_size == 0 or self.local_width > 0
        require(whole, "patch_size", self.patch_size, f"a divisor of width {self.width}")
        most = self.condition_dim
        require(self.query_dim <= most, "query_dim", self.query_dim, f"at most condition_dim {most}")
        reads_all = not (self.plain_slots and self.query_dim)
        require(reads_all, "query_dim", self.query_dim, "0 with plain_slots, which know no query")
        fits = self.map_width % (KEYS_PER_VALUE * self.heads) == 0
        require(fits, "map_width", self.map_width, f"a multiple of {KEYS_PER_VALUE * self.heads}")
        local, grids = self.local_width, self.grid_neighbors
        require(
            (local > 0) == (self.local_blocks > 0), "local_blocks", self.local_blocks, "above 0 with local_width only"
        )
        require(local > 0 or not grids, "grid_neighbors", grids, "0 without local_width, whose layers read them")
        most = self.depth if grids else 0
        fits = min(1, grids) <= self.grid_layers <= most
        require(fits, "grid_layers", self.grid_layers, f"from {min(1, grids)} to {most} with grid_neighbors {grids}")
        window = self.copy_window
        require(window % 2 == 1 or not window, "copy_window", window, "odd, or 0")
        require(grids > 0 or not window, "copy_window", window, "0 without grid_neighbors, whose codes it copies")
        require(self.step_width >= 2 and self.step_width % 2 == 0, "step_width", self.step_width, "even and at least 2")

    @property
    def seq(self) -> int:
        """Tokens of one image."""
        return self.grid**2

    @property
    def places(self) -> int:
        """Positions of the transformer."""
        return (self.grid // self.patch_size) ** 2

    @property
    def token_width(self) -> int:
        """Channels of a token before it is merged to a place."""
        return self.local_width or self.width // self.patch_size

    @property
    def mask_id(self) -> int:
        """The token that stands for [MASK]."""
        return self.vocab_size


PAPER = DenoiserConfig(
    vocab_size=2887, grid=32, width=1024, depth=24, heads=16, condition_dim=512, num_steps=100, step_width=1024
)
"""The paper's transformer: 24 blocks over 32 × 32 tokens of 2,887 codes; 487.1 M parameters (the paper says 470 M)."""


class SelfAttention(nn.Module):
    """Full attention of every place to every place."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query_key_value = nn.Linear(config.width, 3 * config.width)
        self.output = nn.Linear(config.width, config.width)

    def forward(self, h: Float[Tensor, "batch places width"]) -> Float[Tensor, "batch places width"]:
        """Mix the places."""
        q, k, v = rearrange(self.query_key_value(h), "b s (three n c) -> three b n s c", three=3, n=self.heads)
        return self.output(rearrange(attend(q, k, v), "b n s c -> b s (n c)"))


class Block(nn.Module):
    """One transformer block; the step enters through the norms of both attentions."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config)
        self.cross_attention = CrossAttention(
            config.width, config.heads, config.condition_dim, bias=config.cross_attention_bias
        )
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp_in = nn.Linear(config.width, config.mlp_ratio * config.width)
        self.mlp_out = nn.Linear(config.mlp_ratio * config.width, config.width)
        self.gelu = sigmoid_gelu if config.sigmoid_gelu else functional.gelu

    def forward(
        self,
        h: Float[Tensor, "batch places width"],
        modulation: Float[Tensor, "4 batch 1 width"],
        keys: Float[Tensor, "batch width pairs"],
        offsets: Float[Tensor, "batch 1 pairs"],
        values: Float[Tensor, "batch pairs width"],
    ) -> Float[Tensor, "batch places width"]:
        """Add what the three branches say."""
        self_scale, self_shift, cross_scale, cross_shift = modulation
        h = h + self.self_attention(adaptive_norm(h, self_scale, self_shift))
        h = h + self.cross_attention(adaptive_norm(h, cross_scale, cross_shift), keys, offsets, values)
        return h + self.mlp_out(self.gelu(self.mlp_in(self.mlp_norm(h))))


def sigmoid_gelu(x: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
    """The GELU of VQ-Diffusion."""
    return x * torch.sigmoid(1.702 * x)


class Denoiser(nn.Module):
    """p(x_0 | x_n, y) for every token at once.

    The query slot and the neighbor slots enter through projections of their own; neighbors carry no rank, so their
    order does not matter. Neither these nor any of cross-attention's projections has a bias, and nothing is added to
    y: the null condition y' = 0 gives zero values and removes cross-attention exactly (Sec. 3.2's claim).

    Differs from VQ-Diffusion, which the paper follows: no biases in cross-attention, one shared embedding of the step,
    the exact GELU, initial weights scaled to their fan-in. With `cross_attention_bias`, `step_table`, `sigmoid_gelu` and
    `plain_slots` it is VQ-Diffusion's transformer, whose weights `convert.vq_diffusion` reads.
    """

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        """Whether training keeps of each block its input only and computes the rest again: less memory, a third more time."""
        p, side = config.patch_size, config.grid // config.patch_size
        self.token_table = nn.Embedding(config.vocab_size + 1, config.token_width)
        merged = p * p * config.token_width
        self.merge = nn.Identity() if p == 1 and not config.local_width else nn.Linear(merged, config.width)
        self.row_table = nn.Parameter(torch.empty(side, 1, config.width))
        self.column_table = nn.Parameter(torch.empty(side, config.width))
        self.step_embedding, self.modulation = self._step_layers(config)
        self.query_slot, self.neighbor_slots = self._slot_layers(config), self._slot_layers(config)
        self.slot_maps: SlotMaps | None = None
        if config.map_width:
            self.slot_maps = SlotMaps(config.condition_dim, config.places, config.heads, config.map_width)
        self.map_attention = nn.ModuleDict(
            {
                str(number): MapAttention(config.width, config.heads, config.map_width)
                for number in (0, config.depth // 2)
                if config.map_width
            }
        )
        self.blocks = nn.ModuleList([Block(config) for _ in range(config.depth)])
        read, at_once = (config.local_width, 1) if config.local_width else (config.width, p * p)
        self.head_norm = nn.LayerNorm(read)
        self.head = nn.Linear(read, at_once * config.vocab_size)
        self.code_traits: CodeTraits | None = None
        if config.code_dim:
            self.code_traits = CodeTraits(
                config.vocab_size, config.code_dim, table_width=config.token_width, head_width=read, at_once=at_once
            )
        self.local: LocalLayers | None = None
        if config.local_width:
            self.local = LocalLayers(
                config.width, p, config.local_width, config.local_blocks, leader=config.grid_neighbors > 0
            )
        self.grid_reader: GridReader | None = None
        if config.grid_neighbors:
            self.grid_reader = GridReader(config.width, config.heads, side, config.grid_neighbors)
        self.grid_attention = nn.ModuleDict(
            {
                str(number * config.depth // config.grid_layers): GridAttention(config.width, config.heads, side)
                for number in range(config.grid_layers)
            }
        )
        self.copy_head: CopyHead | None = None
        if config.copy_window:
            self.copy_head = CopyHead(read, config.grid, config.grid_neighbors, config.copy_window)
        self.initialize_weights()

    @staticmethod
    def _step_layers(config: DenoiserConfig) -> tuple[nn.Module, nn.Module]:
        if config.step_table:
            return StepTable(config.num_steps, config.depth, config.width), nn.Identity()
        embedding = StepEmbedding(config.num_steps, config.step_width)
        return embedding, nn.Linear(config.step_width, config.depth * 4 * config.width)

    @staticmethod
    def _slot_layers(config: DenoiserConfig) -> nn.Module:
        if config.plain_slots:
            return nn.Identity()
        return nn.Linear(config.condition_dim, config.condition_dim, bias=False)

    def initialize_weights(self) -> None:
        """Draw all weights so that signals of unit size stay of unit size, and the first prediction is uniform."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Token, row and column add up to unit variance, so that the first block hears all three.
        for table in (self.token_table.weight, self.row_table, self.column_table):
            nn.init.normal_(table, std=3**-0.5)
        # The 3 · depth branches together add unit variance to the stream, however deep it is.
        for block in self._blocks:
            for layer in (block.self_attention.output, block.cross_attention.output, block.mlp_out):
                nn.init.normal_(layer.weight, std=(3 * self.config.depth * layer.in_features) ** -0.5)
        # AdaLN starts near the plain norm, the logits near zero: the loss starts at ln(vocab). Not at zero itself,
        # which would stop the gradient to everything behind it in the first step.
        for last in (self.modulation, self.head):
            if isinstance(last, nn.Linear):
                nn.init.normal_(last.weight, std=0.1 * last.in_features**-0.5)
        if self.code_traits is not None:
            traits, read = self.code_traits.traits.shape[1], self.head.in_features
            nn.init.normal_(self.code_traits.head.weight, std=0.1 * (traits * read) ** -0.5)
        if self.local is not None:
            self.local.initialize_weights()
        if self.grid_reader is not None:
            self.grid_reader.initialize_weights()
        for reader in self.grid_attention.values():
            cast(GridAttention, reader).initialize_weights(len(self.grid_attention))
        if self.copy_head is not None:
            self.copy_head.initialize_weights()

    @property
    def _blocks(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))  # torch's stubs say Module

    @property
    def shards(self) -> list[list[nn.Module]]:
        """Groups of layers whose weights only their own forward reads: FSDP may gather each just for that time.

        Cross-attention is in none, since `prepare` reads its weights from outside the block.
        """
        return [[block.self_attention, block.mlp_norm, block.mlp_in, block.mlp_out] for block in self._blocks]

    @property
    def hidden_matrices(self) -> list[nn.Parameter]:
        """Weight matrices from hidden layer to hidden layer, in a fixed order: neither tables nor the head."""
        layers = [self.blocks, self.grid_attention, self.map_attention, self.local, self.grid_reader, self.copy_head]
        modules = [module for layer in layers if layer is not None for module in layer.modules()]
        return [cast(nn.Parameter, module.weight) for module in modules if isinstance(module, nn.Linear)]

    @property
    def parameter_count(self) -> int:
        """Number of trained values."""
        return sum(parameter.numel() for parameter in self.parameters())

    def prepare(self, condition: Condition) -> PreparedCondition:
        """What the places read of y: cross-attention's keys and values in every block, maps and grids; the same at every step.

        Raises: FingerprintError when y has another width than the denoiser was built for; UsageError for more grids than it reads,
            or grids of another size.
        """
        expected, got = self.config.condition_dim, condition.y.shape[-1]
        if got != expected:
            raise FingerprintError(
                f"the denoiser reads {expected}-d embeddings, the condition has {got}-d ones: "
                "use the encoder it was trained with"
            )
        # Entries of a unit vector have size dim^-½; bring them to unit size, as the layers behind expect.
        scale = 1 if self.config.plain_slots else sqrt(expected)
        y = condition.y.to(self.head.weight.dtype)  # batch slots dim
        query, neighbors = scale * self._readable(y[:, :1]), scale * y[:, 1:]
        y = torch.cat([self.query_slot(query), self.neighbor_slots(neighbors)], dim=1)  # batch slots dim
        layers = [block.cross_attention.prepare(y, condition.present) for block in self._blocks]
        keys, offsets, values = (torch.stack(parts) for parts in zip(*layers, strict=True))
        maps = None if self.slot_maps is None else self.slot_maps(y, condition.present)
        grids, offers = self._read_grids(condition)
        return PreparedCondition(keys=keys, offsets=offsets, values=values, maps=maps, grids=grids, offers=offers)

    def _read_grids(self, condition: Condition) -> tuple[Grids | None, Offers | None]:
        """What the layers read of the neighbors' grids; as much for all conditions, so that they can stand in one batch."""
        if self.grid_reader is None:
            return None, None
        most, seq, batch = self.config.grid_neighbors, self.config.seq, len(condition.y)
        grids = torch.zeros(batch, most, seq, dtype=torch.long, device=condition.y.device)
        present = torch.zeros(batch, most, dtype=torch.bool, device=condition.y.device)
        if condition.grids is not None and condition.grids_present is not None:
            m, length = condition.grids.shape[1:]
            if m > most or length != seq:
                raise UsageError(
                    f"the denoiser reads {most} grids of {seq} tokens at most, got {m} of {length}: leave out the others, and "
                    "use the tokenizer it was trained with"
                )
            grids[:, :m], present[:, :m] = condition.grids, condition.grids_present
        tokens = self._features(grids.flatten(0, 1))  # (batch m) seq local_width
        places = self._merged(tokens).unflatten(0, (batch, most))  # batch m places width
        tokens = tokens.unflatten(0, (batch, most))
        offers = None if self.copy_head is None else self.copy_head.offers(grids, tokens, present)
        return self.grid_reader(places, tokens, present), offers

    def _readable(self, query: Float[Tensor, "batch 1 dim"]) -> Float[Tensor, "batch 1 dim"]:
        """The query with the coordinates that no text can fill set to zero, at unit length again; a zero query stays zero.

        Else the denoiser would copy looks from an image's own embedding in training, and have nothing to copy from a text.

        Differs from the paper, which reads the whole query: its CLIP space does not say where looks are.
        """
        if not self.config.query_dim:
            return query
        shown = functional.normalize(query[..., : self.config.query_dim], dim=-1)
        return functional.pad(shown, (0, query.shape[-1] - self.config.query_dim))

    def modulate(self, step: Steps) -> Float[Tensor, "depth 4 batch 1 width"]:
        """AdaLN's scale and shift at the step: for each block self-attention's pair, then cross-attention's."""
        scales_shifts = self.modulation(self.step_embedding(step))  # batch (depth 4 width)
        return rearrange(scales_shifts, "b (d four w) -> d four b 1 w", d=self.config.depth, four=4)

    def forward(
        self,
        x_n: Tokens,
        step: Steps,
        condition: Condition | PreparedCondition,
        asked: Bool[Tensor, "batch seq"] | None = None,
    ) -> Logits | Float[Tensor, "asked vocab"]:
        """Predict x_0 from noised tokens.

        Args:
            x_n: codes in [0, vocab], where vocab is [MASK].
            step: the step 1 … N of each row.
            condition: y, or better what `prepare` made of it when the same y serves many steps.
            asked: the tokens to predict; the head spends nothing on others. None: all.

        Returns: logits over the codes in float32, whatever the arithmetic; of the tokens asked for only, one image after the
            other, if any are named.
        Raises: UsageError when the number of tokens is not grid²; FingerprintError as `prepare`.
        """
        if x_n.shape[1] != self.config.seq:
            raise UsageError(
                f"the denoiser works on {self.config.grid} × {self.config.grid} tokens, "
                f"got {x_n.shape[1]} in a row: use the tokenizer it was trained with"
            )
        prepared = condition if isinstance(condition, PreparedCondition) else self.prepare(condition)
        tokens = self._features(x_n)  # batch seq token_width
        h = self._placed(tokens)  # batch places width
        layers = zip(self.modulate(step), prepared.keys, prepared.offsets, prepared.values, strict=True)
        for number, (block, layer) in enumerate(zip(self.blocks, layers, strict=True)):
            if prepared.maps is not None and str(number) in self.map_attention:
                h = h + self.map_attention[str(number)](h, prepared.maps)
            if prepared.grids is not None and str(number) in self.grid_attention:
                h = h + self.grid_attention[str(number)](h, prepared.grids)
            h = self._through(block, h, *layer)  # batch places width
        if self.local is not None:
            leader = None if prepared.grids is None else prepared.grids.leader
            h = self.local(self.unmerge(self.local.unmerge(self.local.place_norm(h))), tokens, leader)
        return self._head(h, prepared.offers, asked)

    def _head(
        self, h: Float[Tensor, "batch either width"], offers: Offers | None, asked: Bool[Tensor, "batch seq"] | None
    ) -> Tensor:
        """Logits from what the last layer says of each token, or of each place of p × p tokens."""
        rows = self.head.weight if self.code_traits is None else self.head.weight + self.code_traits.head_rows()
        single = self.local is not None or self.config.patch_size == 1
        if single and asked is not None:
            h = h[asked]
        read = self.head_norm(h)
        logits = functional.linear(read, rows, self.head.bias).float()
        if not single:
            logits = self.unmerge(logits)
            logits = logits if asked is None else logits[asked]
        if self.copy_head is None or offers is None:
            return logits
        return cast(Tensor, self.copy_head(logits, read, offers if asked is None else offers.of(asked)))

    def _through(self, block: nn.Module, *inputs: Tensor) -> Tensor:
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return cast(Tensor, block(*inputs))
        return cast(Tensor, checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False))

    def embed(self, x_n: Tokens) -> Float[Tensor, "batch places width"]:
        """Embeddings of the tokens, p × p of them merged, plus where they stand."""
        return self._placed(self._features(x_n))

    def _placed(self, tokens: Float[Tensor, "batch seq token_width"]) -> Float[Tensor, "batch places width"]:
        return self._merged(tokens) + (self.row_table + self.column_table).flatten(0, 1)

    def _features(self, tokens: Tokens) -> Float[Tensor, "batch seq token_width"]:
        """Embeddings of the tokens, with `local_width` of their surroundings too."""
        rows = self.token_table.weight
        if self.code_traits is not None:
            rows = rows + self.code_traits.table_rows()
        h = functional.embedding(tokens, rows)
        return h if self.local is None else cast(Tensor, self.local.into(in_arithmetic(h)))

    def _merged(self, tokens: Float[Tensor, "batch seq token_width"]) -> Float[Tensor, "batch places width"]:
        p, side = self.config.patch_size, self.config.grid // self.config.patch_size
        if p > 1:
            tokens = rearrange(tokens, "b (i p j q) w -> b (i j) (p q w)", i=side, j=side, p=p, q=p)
        return cast(Tensor, self.merge(tokens))

    def unmerge(self, values: Float[Tensor, "batch places patch_values"]) -> Float[Tensor, "batch seq values"]:
        """What belongs to each token of each place, in grid order."""
        p, side = self.config.patch_size, self.config.grid // self.config.patch_size
        if p == 1:
            return values
        return rearrange(values, "b (i j) (p q v) -> b (i p j q) v", i=side, j=side, p=p, q=p)
