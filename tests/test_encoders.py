"""Every encoder answers the same calls with unit rows that do not depend on what else was encoded."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_encoder import tiny_encoder, tiny_sticker_config, tiny_sticker_encoder, tiny_tokenizer

from knn_diffusion import images
from knn_diffusion.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from knn_diffusion.errors import CheckpointError, ConfigError, ImageError, MissingDependencyError, UsageError
from knn_diffusion.images import frame
from knn_diffusion.models import encoders
from knn_diffusion.models.encoders import JointEncoder, SmallJointEncoder, load_encoder, save_encoder
from knn_diffusion.models.fixed_batches import IMAGES_AT_ONCE
from knn_diffusion.models.small_encoder import SmallEncoder, SmallEncoderConfig
from knn_diffusion.models.sticker_encoder import StickerEncoder, StickerEncoderConfig, StickerJointEncoder
from knn_diffusion.models.transformers_encoder import TransformersEncoder, vector_of

TEXTS = ["a red dog", "the blue heart", "apple"]


def some_images(count: int, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 256, (20 + i % 3, 18, 3), np.uint8)) for i in range(count)]


def published(folder: Path, kind: str) -> Path:
    """A folder as the hub serves it: a tiny CLIP or SigLIP with seeded random weights."""
    import transformers

    torch.manual_seed(5)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer(), unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    )
    towers: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = towers | {"vocab_size": len(tokenizer), "max_position_embeddings": 12}
    text |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    vision = towers | {"image_size": 16, "patch_size": 8}
    if kind == "clip":
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
        model: Any = transformers.CLIPModel(config)
        processor: Any = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        )
    else:
        model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision))
        processor = transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16})
    for part in (model, processor, tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(params=["stickers", "small", "clip", "siglip"])
def encoder(request: pytest.FixtureRequest, tmp_path: Path) -> JointEncoder:
    own = {"stickers": tiny_sticker_encoder, "small": tiny_encoder}
    return own[request.param]() if request.param in own else load_encoder(published(tmp_path / "hub", request.param))


def test_rows_are_float32_unit_vectors(encoder: JointEncoder) -> None:
    assert isinstance(encoder, JointEncoder)
    for rows, count in ((encoder.encode_images(some_images(3)), 3), (encoder.encode_texts(TEXTS), 3)):
        assert rows.shape == (count, encoder.dim)
        assert rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)


def test_no_images_and_no_texts_give_no_rows(encoder: JointEncoder) -> None:
    assert encoder.encode_images([]).shape == (0, encoder.dim)
    assert encoder.encode_texts([]).shape == (0, encoder.dim)


def test_a_vector_does_not_depend_on_its_company(encoder: JointEncoder) -> None:
    many = some_images(IMAGES_AT_ONCE + 3)
    together = encoder.encode_images(many)
    np.testing.assert_array_equal(together[:2], encoder.encode_images(many[:2]))
    np.testing.assert_array_equal(together[-1:], encoder.encode_images(many[-1:]))
    np.testing.assert_array_equal(encoder.encode_texts(TEXTS)[1:2], encoder.encode_texts(TEXTS[1:2]))


def sticker(colour: tuple[int, int, int], size: tuple[int, int], place: tuple[int, int]) -> Image.Image:
    drawn = Image.new("RGBA", size, (*colour, 0))
    drawn.paste((*colour, 255), (*place, place[0] + 60, place[1] + 40))
    drawn.paste((0, 90, 200, 255), (place[0] + 20, place[1] + 10, place[0] + 30, place[1] + 30))
    return drawn


def test_margins_of_a_transparent_picture_make_no_difference(encoder: JointEncoder) -> None:
    narrow, wide = (sticker((200, 30, 30), *where) for where in (((64, 44), (2, 1)), ((300, 200), (210, 10))))
    np.testing.assert_array_equal(*encoder.encode_images([narrow, wide]))


def test_a_transparent_picture_is_seen_on_white_and_a_white_one_on_grey(encoder: JointEncoder) -> None:
    own = (191, 191, 191) if isinstance(encoder, StickerJointEncoder) else None  # that one knows grey alone
    for colour, ground in (((200, 30, 30), own or (255, 255, 255)), ((255, 255, 255), own or (128, 128, 128))):
        seen = sticker(colour, (64, 64), (2, 12))
        np.testing.assert_array_equal(*encoder.encode_images([seen, images.on_ground(images.frame(seen, 16), ground)]))


def test_a_picture_that_is_transparent_everywhere_has_no_vector(encoder: JointEncoder) -> None:
    with pytest.raises(ImageError, match="all transparent"):
        encoder.encode_images([sticker((200, 30, 30), (64, 44), (2, 1)), Image.new("RGBA", (20, 20), (200, 0, 0, 3))])


def test_a_saved_encoder_keeps_its_vectors_and_its_fingerprint(encoder: JointEncoder, tmp_path: Path) -> None:
    save_encoder(encoder, tmp_path / "once")
    once = load_encoder(tmp_path / "once")
    save_encoder(once, tmp_path / "twice")
    twice = load_encoder(tmp_path / "twice")
    assert once.fingerprint == twice.fingerprint
    assert len(once.fingerprint) == 64
    np.testing.assert_array_equal(once.encode_images(some_images(2)), twice.encode_images(some_images(2)))
    np.testing.assert_array_equal(once.encode_texts(TEXTS), twice.encode_texts(TEXTS))
    assert (once.encode_images(some_images(2)) * encoder.encode_images(some_images(2))).sum(1).min() > 0.9999
    assert (once.encode_texts(TEXTS) * encoder.encode_texts(TEXTS)).sum(1).min() > 0.999
    assert "weights_sha256" in json.loads((tmp_path / "once" / CONFIG_FILE).read_text())


@pytest.mark.parametrize("prompt", ["", "  "])
def test_an_empty_prompt_is_refused(encoder: JointEncoder, prompt: str) -> None:
    with pytest.raises(UsageError, match="at least one word"):
        encoder.encode_texts([prompt])


def test_an_over_long_prompt_is_refused_with_the_limit_and_what_came(encoder: JointEncoder) -> None:
    with pytest.raises(UsageError, match=r"at most \d+ .*, got \d+ .*: shorten the prompt"):
        encoder.encode_texts(["dog " * 40])


def test_the_text_tower_lies_in_a_folder_of_its_own(tmp_path: Path) -> None:
    save_encoder(tiny_encoder(), tmp_path / "encoder")
    assert (tmp_path / "encoder" / "text" / WEIGHTS_FILE).is_file()
    before = (tmp_path / "encoder" / "text" / WEIGHTS_FILE).read_bytes()
    loaded = load_encoder(tmp_path / "encoder")
    assert isinstance(loaded, SmallJointEncoder)
    loaded.network.image_tower.head.weight.data.mul_(2)
    save_encoder(loaded, tmp_path / "encoder")
    assert (tmp_path / "encoder" / "text" / WEIGHTS_FILE).read_bytes() == before


def test_other_weights_or_another_vocabulary_are_another_fingerprint() -> None:
    encoder, other = tiny_encoder(), tiny_encoder(1)
    mixed = SmallJointEncoder(encoder.network, other.sentences, "tiny")
    assert len({encoder.fingerprint, other.fingerprint, mixed.fingerprint}) == 3
    assert tiny_encoder().fingerprint == encoder.fingerprint


def test_another_preprocessing_is_another_fingerprint(tmp_path: Path) -> None:
    encoder = load_encoder(published(tmp_path, "clip"))
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    settings["image_mean"] = [0.5, 0.5, 0.5]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert load_encoder(tmp_path).fingerprint != encoder.fingerprint


def test_features_may_come_as_a_tensor_or_as_an_object() -> None:
    vector = torch.ones(1, 3)
    assert vector_of(vector) is vector
    assert vector_of(SimpleNamespace(pooler_output=vector)) is vector


def test_the_adapter_works_with_a_library_that_answers_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder(published(tmp_path, "clip"))
    assert isinstance(encoder, TransformersEncoder)
    expected = encoder.encode_images(some_images(2)), encoder.encode_texts(TEXTS)
    for name in ("get_image_features", "get_text_features"):
        new = getattr(encoder.model, name)
        monkeypatch.setattr(encoder.model, name, lambda new=new, **inputs: new(**inputs).pooler_output)
    np.testing.assert_array_equal(encoder.encode_images(some_images(2)), expected[0])
    np.testing.assert_array_equal(encoder.encode_texts(TEXTS), expected[1])


def test_clip_vectors_are_the_librarys_own(tmp_path: Path) -> None:
    import transformers

    encoder = load_encoder(published(tmp_path, "clip"))
    model = transformers.CLIPModel.from_pretrained(tmp_path)
    processor = transformers.CLIPImageProcessorPil.from_pretrained(tmp_path)
    inputs = processor(images=some_images(3), return_tensors="pt")
    with torch.no_grad():
        features = model.get_image_features(**inputs).pooler_output
    expected = torch.nn.functional.normalize(features, dim=-1).numpy()
    np.testing.assert_allclose(encoder.encode_images(some_images(3)), expected, rtol=1e-4, atol=1e-6)


def test_siglip_texts_are_padded_to_the_full_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder(published(tmp_path, "siglip"))
    assert isinstance(encoder, TransformersEncoder)
    seen: list[tuple[int, ...]] = []
    original = encoder.model.get_text_features

    def spy(**inputs: torch.Tensor) -> Any:
        seen.append(tuple(inputs["input_ids"].shape))
        return original(**inputs)

    monkeypatch.setattr(encoder.model, "get_text_features", spy)
    encoder.encode_texts(["dog"])
    assert seen == [(1, 12)]


def test_without_transformers_the_error_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'knn-diffusion\[clip\]'"):
        load_encoder("clip")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"expected an encoder \(stickers, clip, .*got 'no-such-model'"):
        load_encoder("no-such-model", network=True)


def test_a_folder_that_is_no_encoder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, ConfigError), match="expected a sticker-encoder"):
        load_encoder(tmp_path)


def test_the_registry_takes_new_names(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny_encoder()
    monkeypatch.setitem(encoders.REGISTRY, "mine", lambda network: made)
    assert load_encoder("mine") is made


@pytest.mark.parametrize("wrong", [{"size": 20}, {"blocks": (1,)}, {"squeeze": 0.0}, {"dim": 0}])
def test_an_impossible_shape_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SmallEncoderConfig(**wrong)


def test_the_default_tower_has_the_size_it_states() -> None:
    count = sum(parameter.numel() for parameter in SmallEncoder(SmallEncoderConfig()).parameters())
    assert 2.8e6 < count < 3.0e6


def disc(colour: tuple[int, int, int], *, side: int = 40, margin: int = 4) -> Image.Image:
    """A transparent picture with a disc, more to the left than to the right."""
    y, x = np.mgrid[:side, :side]
    inside = (x - side * 0.4) ** 2 + (y - side / 2) ** 2 < (side / 3 - margin) ** 2
    return Image.fromarray(np.dstack([np.full((side, side, 3), colour), inside * 255]).astype(np.uint8), "RGBA")


def test_a_transparent_picture_is_seen_framed_and_on_grey() -> None:
    encoder = tiny_sticker_encoder()
    wide = Image.new("RGBA", (90, 70))
    wide.paste(disc((200, 30, 30)), (31, 11))
    seen = encoder.encode_images([disc((200, 30, 30)), wide])
    np.testing.assert_array_equal(seen[0], seen[1])
    on_grey = Image.new("RGB", (16, 16), (191, 191, 191))
    framed = frame(disc((200, 30, 30)), 16)
    on_grey.paste(framed, mask=framed)
    np.testing.assert_array_equal(seen[:1], encoder.encode_arrays(np.asarray(on_grey)[None]))


def test_white_and_black_art_do_not_vanish() -> None:
    encoder = tiny_sticker_encoder()
    white, black, nothing = encoder.encode_images(
        [disc((255, 255, 255)), disc((0, 0, 0)), Image.new("RGB", (40, 40), (191, 191, 191))]
    )
    assert white @ nothing < 0.999
    assert black @ nothing < 0.999


def test_size_and_ground_are_part_of_the_fingerprint() -> None:
    encoder = tiny_sticker_encoder()
    darker = StickerEncoder(replace(tiny_sticker_config(), ground=100))
    darker.load_state_dict(encoder.network.state_dict())
    assert StickerJointEncoder(darker, encoder.sentences).fingerprint != encoder.fingerprint


def test_the_text_center_is_taken_off_before_the_head() -> None:
    network = tiny_sticker_encoder().network
    network.text_center.copy_(torch.ones(16))
    network.text_head.bias.zero_()
    expected = torch.nn.functional.normalize(network.text_head.weight.sum(1), dim=0)
    torch.testing.assert_close(network.embed_texts(torch.full((1, 16), 2.0))[0], expected)


@pytest.mark.parametrize("wrong", [{"size": 18}, {"dim": 0}, {"ground": 256}, {"place_width": 0}])
def test_an_impossible_sticker_encoder_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        replace(tiny_sticker_config(), **wrong)


def test_the_default_sticker_encoder_has_the_size_it_states() -> None:
    count = sum(parameter.numel() for parameter in StickerEncoder(StickerEncoderConfig()).parameters())
    assert 3.8e6 < count < 4.0e6
