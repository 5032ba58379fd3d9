"""A joint encoder small enough for tests: random weights, a vocabulary of a few words."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from knn_diffusion.models.efficientnet import EfficientNetConfig, Stage
from knn_diffusion.models.encoders import SmallJointEncoder
from knn_diffusion.models.small_encoder import SmallEncoder, SmallEncoderConfig
from knn_diffusion.models.sticker_encoder import StickerEncoder, StickerEncoderConfig, StickerJointEncoder
from knn_diffusion.models.text_tower import SentenceEncoder, TextTower, TextTowerConfig

WORDS = [
    "a",
    "an",
    "on",
    "of",
    "in",
    "with",
    "the",
    "red",
    "green",
    "blue",
    "yellow",
    "black",
    "white",
    "pink",
    "teal",
    "purple",
    "orange",
    "grey",
    "plain",
    "dog",
    "cat",
    "heart",
    "apple",
    "background",
    "picture",
    "sticker",
    "drawing",
    "emoji",
    "and",
]
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefghijklmnopqrstuvwxyz,-"]
PIECES = list(dict.fromkeys([*PIECES, *[f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]]))


def tiny_tokenizer() -> Tokenizer:
    numbers = {piece: number for number, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.WordPiece(numbers, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", numbers["[CLS]"]), ("[SEP]", numbers["[SEP]"])]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


def tiny_text_config(max_tokens: int = 24) -> TextTowerConfig:
    return TextTowerConfig(
        vocab_size=len(PIECES), width=16, num_layers=2, num_heads=2, hidden_width=32, max_tokens=max_tokens
    )


def tiny_sentences(seed: int = 0, max_tokens: int = 24) -> SentenceEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SentenceEncoder(TextTower(tiny_text_config(max_tokens)), tiny_tokenizer())


def tiny_config() -> SmallEncoderConfig:
    return SmallEncoderConfig(size=16, dim=8, text_width=16, stem_width=4, widths=(8, 8), blocks=(1, 1))


def tiny_encoder(seed: int = 0) -> SmallJointEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return SmallJointEncoder(SmallEncoder(tiny_config()), tiny_sentences(seed), "tiny")


def tiny_sticker_config() -> StickerEncoderConfig:
    stages = (Stage(width=8, blocks=1, kernel=3, stride=1, expand=1), Stage(width=8, blocks=2, kernel=5, stride=2))
    backbone = EfficientNetConfig(stem_width=8, stages=stages, width=16)
    return StickerEncoderConfig(backbone=backbone, size=16, dim=8, place_width=4, text_width=16)


def tiny_sticker_encoder(seed: int = 0) -> StickerJointEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return StickerJointEncoder(StickerEncoder(tiny_sticker_config()), tiny_sentences(seed), "tiny")
