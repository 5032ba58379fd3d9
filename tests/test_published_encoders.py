"""CLIP and SigLIP 2 as they are published: the real architectures, tokenizers and settings, tiny and of random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_encoders import some_images
from torch import Tensor

from knn_diffusion.errors import CheckpointError, MissingDependencyError, UsageError
from knn_diffusion.image_index import ImageIndex
from knn_diffusion.models.encoders import load_encoder, save_encoder
from knn_diffusion.retrieval.dedup import DedupConfig

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,!"
MERGES = [("r", "e"), ("c", "a")]
TOWER = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXTS = ["a red CAT", "Red", "a cat, a dog!"]
LONGEST = 24


def clip(folder: Path, activation: str = "quick_gelu") -> None:
    """OpenAI's files: vocabulary and merges apart, settings of the first versions. LAION's have another activation."""
    import transformers

    pieces = [
        *LETTERS,
        *[f"{letter}</w>" for letter in LETTERS],
        *["".join(pair) for pair in [*MERGES, ("re", "d</w>")]],
    ]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    lines = ["#version: 0.2", *[" ".join(pair) for pair in [*MERGES, ("re", "d</w>")]]]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    ends = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    tokenizer = ends | {"unk_token": "<|endoftext|>", "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"name_or_path": "./clip_ViT_B_32/"}))
    images = {
        "crop_size": 16,
        "size": 16,
        "resample": 3,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
    }
    mean = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
    kind = {"feature_extractor_type": "CLIPFeatureExtractor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(images | mean | kind))
    text = TOWER | {"vocab_size": len(vocabulary), "max_position_embeddings": LONGEST, "hidden_act": activation}
    text |= {"bos_token_id": len(vocabulary) - 2, "eos_token_id": len(vocabulary) - 1, "pad_token_id": 0}
    vision = TOWER | {"image_size": 16, "patch_size": 8, "hidden_act": activation}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
    transformers.CLIPModel(config).save_pretrained(folder)


def laion(folder: Path) -> None:
    clip(folder, "gelu")


def siglip_tokenizer(folder: Path, name: str) -> dict[str, int]:
    """The vocabulary of a tokenizer of Gemma's kind, which knows capitals."""
    import transformers

    marks = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁"]
    pieces = [*marks, *LETTERS, *LETTERS[:26].upper(), "re", "ca", "red"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    getattr(transformers, name)(vocab=vocabulary, merges=[*MERGES, ("re", "d")]).save_pretrained(folder)
    return {"vocab_size": len(vocabulary), "max_position_embeddings": LONGEST, "projection_size": 8}


def siglip2(folder: Path) -> None:
    """One size for all images: its network is SigLIP's, its tokenizer Gemma's."""
    import transformers

    text = TOWER | siglip_tokenizer(folder, "GemmaTokenizer")
    vision = TOWER | {"image_size": 16, "patch_size": 8}
    transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    transformers.SiglipImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)


def siglip2_naflex(folder: Path) -> None:
    """Images keep their shape: a number of patches, some of them none."""
    import transformers

    text = TOWER | siglip_tokenizer(folder, "Siglip2Tokenizer")
    vision = TOWER | {"num_patches": 16, "patch_size": 8}
    transformers.Siglip2Model(transformers.Siglip2Config(text_config=text, vision_config=vision)).save_pretrained(
        folder
    )
    transformers.Siglip2ImageProcessorPil(patch_size=8, max_num_patches=9).save_pretrained(folder)


PUBLISHED = {"clip": clip, "laion": laion, "siglip2": siglip2, "siglip2-naflex": siglip2_naflex}


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        PUBLISHED[request.param](folder)
    return request.param, folder


@pytest.fixture
def own(published: tuple[str, Path], tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(published[1], tmp_path / "own"))


def unit(features: Any) -> np.ndarray:
    return torch.nn.functional.normalize(features.pooler_output, dim=-1).numpy()


def test_vectors_are_those_that_transformers_computes(published: tuple[str, Path]) -> None:
    import transformers

    kind, folder = published
    encoder = load_encoder(folder)
    model = transformers.AutoModel.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    images = [image.resize((40, 24)) for image in some_images(3)]
    with torch.no_grad():
        expected = unit(model.get_image_features(**processor(images=images, return_tensors="pt")))
        np.testing.assert_allclose(encoder.encode_images(images), expected, rtol=1e-4, atol=1e-5)
        for text in TEXTS:
            ids = tokenizer(text if kind in ("clip", "laion") else text.lower())["input_ids"]
            if kind.startswith("siglip"):
                ids += [tokenizer.pad_token_id] * (LONGEST - len(ids))
            expected = unit(model.get_text_features(input_ids=torch.tensor([ids])))
            np.testing.assert_allclose(encoder.encode_texts([text]), expected, rtol=1e-4, atol=1e-5)
    assert encoder.dim == expected.shape[1]


def test_capitals_make_no_difference(published: tuple[str, Path]) -> None:
    encoder = load_encoder(published[1])
    np.testing.assert_array_equal(encoder.encode_texts(["A Red CAT"]), encoder.encode_texts(["a red cat"]))


def test_the_fingerprint_is_that_of_the_content_wherever_it_lies(published: tuple[str, Path], own: Path) -> None:
    before = load_encoder(published[1])
    assert load_encoder(own).fingerprint == before.fingerprint
    save_encoder(before, own.parent / "saved")
    saved = load_encoder(own.parent / "saved")
    assert saved.fingerprint == before.fingerprint
    np.testing.assert_array_equal(saved.encode_texts(TEXTS), before.encode_texts(TEXTS))
    np.testing.assert_array_equal(saved.encode_images(some_images(2)), before.encode_images(some_images(2)))


def change_weight(folder: Path) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights["logit_scale"] += 1e-6 * weights["logit_scale"].abs().clamp(min=1)

    with_weights(folder, change)


def change_images(folder: Path) -> None:
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"image_std": [0.25, 0.25, 0.25]}))


def change_texts(folder: Path) -> None:
    for name in ("tokenizer.json", "vocab.json"):  # every token is another
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text())
            vocabulary = found["model"]["vocab"] if "model" in found else found
            vocabulary["a"], vocabulary["h"] = vocabulary["h"], vocabulary["a"]
            (folder / name).write_text(json.dumps(found))


@pytest.mark.parametrize("change", [change_weight, change_images, change_texts])
def test_another_weight_or_preprocessing_is_another_fingerprint(own: Path, change: Any) -> None:
    before = load_encoder(own).fingerprint
    change(own)
    assert load_encoder(own).fingerprint != before


def with_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder: Path, ending: str = "safetensors") -> Path:
    """Put the weights into two files; returns their index."""
    weights = load_file(folder / "model.safetensors")
    stem, whole = ("model", "model.safetensors") if ending == "safetensors" else ("pytorch_model", "pytorch_model.bin")
    places = {}
    for number in range(2):
        file = f"{stem}-{number + 1:05}-of-00002.{ending}"
        some = {name: value for i, (name, value) in enumerate(sorted(weights.items())) if i % 2 == number}
        save_file(some, folder / file) if ending == "safetensors" else torch.save(some, folder / file)
        places |= dict.fromkeys(some, file)
    (folder / "model.safetensors").unlink()
    index = folder / f"{whole}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return index


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_weights_in_several_files_are_read_by_their_index(own: Path, ending: str) -> None:
    before = load_encoder(own).fingerprint
    cut(own, ending)
    (own / f"model-00003-of-00003.{ending}").write_bytes(b"left over")
    assert load_encoder(own).fingerprint == before


def test_a_saved_encoder_that_was_damaged_is_refused(own: Path) -> None:
    save_encoder(load_encoder(own), own.parent / "saved")
    change_weight(own.parent / "saved")
    with pytest.raises(CheckpointError, match="saved is damaged"):
        load_encoder(own.parent / "saved")


@pytest.mark.parametrize("place", ["", "text_config", "vision_config"])
def test_a_configuration_cannot_bring_code(own: Path, place: str) -> None:
    config = json.loads((own / "config.json").read_text())
    named = dict.fromkeys(("attn_implementation", "_attn_implementation"), "evil/kernel")
    (config[place] if place else config).update(named)
    config["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModel"), "evil--modeling.Evil")
    (own / "config.json").write_text(json.dumps(config))
    (own / "modeling.py").write_text("raise SystemExit")
    model = load_encoder(own).model  # type: ignore[attr-defined]
    assert {one.config._attn_implementation for one in (model, model.text_model, model.vision_model)} == {"sdpa"}


# What cannot be used says so (one kind is enough)


@pytest.fixture
def tiny_clip(tmp_path: Path) -> Path:
    clip(tmp_path)
    return tmp_path


def lose(weights: dict[str, Tensor]) -> None:
    del weights["visual_projection.weight"]


def break_(weights: dict[str, Tensor]) -> None:
    weights["visual_projection.weight"][0, 0] = torch.nan


def widen(weights: dict[str, Tensor]) -> None:
    weights["visual_projection.weight"] = torch.zeros(7, 8)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lose, r"1 tensors missing \(first: visual_projection\.weight\)"),
        (break_, r"visual_projection\.weight holds values that are not finite"),
        (widen, r"expected a model of transformers in .*, it cannot be read"),
    ],
)
def test_wrong_weights_are_refused(tiny_clip: Path, change: Any, text: str) -> None:
    with_weights(tiny_clip, change)
    with pytest.raises(CheckpointError, match=text) as caught:
        load_encoder(tiny_clip)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json", "vocab.json"])
def test_a_missing_file_is_one_line(tiny_clip: Path, name: str) -> None:
    (tiny_clip / name).unlink()
    with pytest.raises(CheckpointError) as caught:
        load_encoder(tiny_clip)
    assert "\n" not in str(caught.value)


def shift(folder: Path) -> None:
    vocabulary = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps({word: number + 500 for word, number in vocabulary.items()}))


def lose_words(folder: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()


def lose_most_words(folder: Path) -> None:
    vocabulary = json.loads((folder / "vocab.json").read_text())
    ends = {"<|startoftext|>": 3, "<|endoftext|>": 4}
    (folder / "vocab.json").write_text(json.dumps(dict(list(vocabulary.items())[:3]) | ends))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def lose_merges(folder: Path) -> None:
    (folder / "merges.txt").write_text("#version: 0.2\n")


def know_one_word(folder: Path) -> None:
    """As many words as there should be, but everything that people write is unknown."""
    count = len(json.loads((folder / "vocab.json").read_text()))
    words = {f"<{number}>": number for number in range(count - 2)} | {
        "<|startoftext|>": count - 2,
        "<|endoftext|>": count - 1,
    }
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (shift, r"expected the tokenizer in .* to know 81 words, as the text tower does, it knows 81"),
        (lose_words, r"expected the tokenizer in .* to know 81 words, .* it knows 2: download the folder again"),
        (lose_most_words, r"expected the tokenizer in .* to know 81 words, .* it knows 5: download the folder again"),
        (lose_merges, r"expected the tokenizer in .* to use its vocabulary, it makes '\w+' of letters"),
        (know_one_word, r"expected .* to tell texts apart, 'a cat' and 'a dog' get one vector"),
    ],
)
def test_a_tokenizer_that_is_not_the_text_towers_is_refused(tiny_clip: Path, change: Any, text: str) -> None:
    change(tiny_clip)
    with pytest.raises(CheckpointError, match=text) as caught:
        load_encoder(tiny_clip)
    assert "\n" not in str(caught.value)


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def spoil(places: dict[str, Any]) -> dict[str, Any]:
    return places | {sorted(places)[0]: SECOND}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda places: places | {"logit_scale": "../../secret.safetensors"}, r"it names '\.\./\.\./secret"),
        (lambda places: places | {"logit_scale": "/etc/secret.safetensors"}, r"files beside .*, it names '/etc/"),
        (lambda places: places | {"logit_scale": "..\\secret.safetensors"}, "files beside .*, it names"),
        (
            lambda places: places | {"logit_scale": "modeling.py"},
            r"names of \.safetensors or \.bin files .*'modeling\.py'",
        ),
        (lambda places: places | {"logit_scale": ["a"]}, "files beside .*, it names"),
        (
            lambda places: places | {"logit_scale": "model-00009-of-00002.safetensors"},
            "1 are missing .first: model-00009",
        ),
        (lambda places: places | {"more": SECOND}, f"expected more in {SECOND}, as .*, it is not there"),
        (spoil, f"in {SECOND} alone, as .* says, {FIRST} holds it too"),
        (lambda places: {}, "it names none"),
        (lambda places: [1, 2], "cannot be read .TypeError"),
    ],
)
def test_an_index_that_cannot_be_right_is_one_line(tiny_clip: Path, change: Any, text: str) -> None:
    index = cut(tiny_clip)
    places = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": change(places)}))
    with pytest.raises(CheckpointError, match=text) as caught:
        load_encoder(tiny_clip)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "b.bin", "a": "c.bin"}}', "[" * 100_000, "\xff"]
)
def test_an_index_that_is_none_is_one_line(tiny_clip: Path, content: str) -> None:
    index = cut(tiny_clip)
    index.write_bytes(content.encode("latin1"))
    with pytest.raises(CheckpointError, match=r"index\.json, it cannot be read .*: download it again") as caught:
        load_encoder(tiny_clip)
    assert "\n" not in str(caught.value)


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    import transformers

    text = TOWER | {"vocab_size": 20, "max_position_embeddings": 8}
    transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="is a CLIPTextModel: choose CLIP or SigLIP"):
        load_encoder(tmp_path)


def test_a_package_that_a_tokenizer_needs_is_named(tiny_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def needs(*_: object, **__: object) -> None:
        raise ImportError("SiglipTokenizer requires the SentencePiece library")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", needs)
    with pytest.raises(MissingDependencyError, match="requires the SentencePiece library: install what it names"):
        load_encoder(tiny_clip)


@pytest.mark.parametrize("kind", ["clip", "siglip2"])
def test_images_of_clip_have_the_papers_rule_and_those_of_others_are_measured(tmp_path: Path, kind: str) -> None:
    PUBLISHED[kind](tmp_path)
    encoder, random = load_encoder(tmp_path), np.random.default_rng(0)
    found = [Image.fromarray(random.integers(0, 256, (8, 8, 3), np.uint8)) for _ in range(6)]
    with ImageIndex.build(found, None, encoder) as index:
        measured = index.calibrated_rule()
        assert index.rule == (DedupConfig() if kind == "clip" else measured)
        assert measured != DedupConfig()
