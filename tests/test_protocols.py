from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from knn_diffusion import stickers
from knn_diffusion.errors import CheckpointError, ConfigError, StoreError, UsageError
from knn_diffusion.evaluation import examiner as examining
from knn_diffusion.evaluation import frechet, protocols
from knn_diffusion.images import SourceImage
from knn_diffusion.models.judge import Judge, JudgeConfig, Verdict
from knn_diffusion.shapes import Neighbors
from knn_diffusion.stickers.drawing import shade
from knn_diffusion.stickers.glyphs import glyph_file_name

SIZE = 32
CONCEPTS = [c for c in stickers.concepts() if not c.flat]
CHOSEN = stickers.of_split(CONCEPTS, "train")[:4] + stickers.of_split(CONCEPTS, "held-out")[:2]
GLYPH_COLOURS = [(130, 60, 20), (250, 250, 120), (20, 120, 20), (90, 20, 130), (150, 200, 255), (255, 200, 160)]
INK = {concept.name: colour for concept, colour in zip(CHOSEN, GLYPH_COLOURS, strict=True)}


class ReadingJudge(Judge):
    """Reads the middle of the picture for the concept and a corner for the background."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__(config)
        self.inks = torch.tensor([INK[name] for name in config.concepts]) / 127.5 - 1
        self.shades = torch.tensor([shade(name) for name in config.colours]) / 127.5 - 1

    def forward(self, pixels: Tensor) -> Verdict:
        middle, corner = pixels[:, :, 14:18, 14:18].mean((2, 3)), pixels[:, :, 0, 0]
        features = torch.cat([middle, corner], 1)
        return Verdict(
            concept=-torch.cdist(middle, self.inks), colour=-torch.cdist(corner, self.shades), features=features
        )


class NamingEncoder:
    """Hears concept names in texts; sees them by the colour in the middle of pictures."""

    names = tuple(concept.name for concept in CHOSEN)

    def encode_texts(self, texts: list[str]) -> np.ndarray:
        return np.array([[float(name in text) for name in self.names] for text in texts], np.float32)

    def encode_image(self, picture: Image.Image) -> np.ndarray:
        middle = picture.resize((SIZE, SIZE)).getpixel((16, 16))
        return -np.abs(np.array([INK[name] for name in self.names]) - np.array(middle)).sum(1).astype(np.float32) / 50


@dataclass
class FakeIndex:
    items: dict[str, tuple[str, Image.Image]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.items)

    def add(self, pictures: list[SourceImage]) -> None:
        for picture in pictures:
            self.items[str(len(self.items))] = (picture.source, picture.load())

    def overlay(self) -> FakeIndex:
        return FakeIndex(dict(self.items))

    def preview(self, one: str) -> Image.Image:
        return self.items[one][1]

    def sources(self, ids: list[str]) -> list[str]:
        return [self.items[one][0] for one in ids]

    def search(self, queries: np.ndarray, k: int, *, modality: str = "image") -> Neighbors:
        encoder = NamingEncoder()
        scores = {one: float(encoder.encode_image(picture) @ queries[0]) for one, (_, picture) in self.items.items()}
        ids = sorted(scores, key=lambda one: -scores[one])[:k]
        values = np.array([[scores[one] for one in ids]], np.float32)
        empty = np.zeros((1, len(ids), 6), np.float32)
        return Neighbors(ids=[ids], scores=values, embeddings=empty, shortfall=np.array([k - len(ids)]))


class HalvingTokenizer(nn.Module):
    """Loses half of the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.config, self.alpha = SimpleNamespace(image_size=SIZE), False
        self.weight = nn.Parameter(torch.zeros(1))

    def encode(self, pixels: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(pixels, 2)

    def decode(self, tokens: Tensor) -> Tensor:
        return nn.functional.interpolate(tokens, scale_factor=2)


class FakePipe:
    """Draws by copying the nearest image, brightened a little more the stronger the guidance."""

    def __init__(self, index: FakeIndex) -> None:
        self.index = index
        self.model = SimpleNamespace(name="fake", encoder=NamingEncoder())
        self.tokenizer = HalvingTokenizer()
        self.asked: list[dict[str, Any]] = []

    def __call__(self, prompt: str, **settings: Any) -> Any:
        self.asked.append({"prompt": prompt, **settings})
        found = self.index.search(self.model.encoder.encode_texts([prompt]), 3)
        picture = self.index.preview(found.ids[0][0])
        noise = np.random.default_rng(settings["seed"] % 2**32).normal(
            settings.get("guidance_scale", 0), 2, (SIZE, SIZE, 3)
        )
        drawn = Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))
        neighbors = [SimpleNamespace(id=one) for one in found.ids[0]]
        return SimpleNamespace(images=[drawn], neighbors=neighbors if settings.get("k") != 0 else [])


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> stickers.FolderGlyphs:
    folder = tmp_path_factory.mktemp("glyphs")
    for concept in CHOSEN:
        glyph = Image.new("RGBA", (60, 60), (0, 0, 0, 0))
        ImageDraw.Draw(glyph).ellipse((0, 0, 59, 59), fill=(*INK[concept.name], 255))
        glyph.save(folder / glyph_file_name(concept.char))
    return stickers.FolderGlyphs(folder)


@pytest.fixture
def examiner(glyphs: stickers.FolderGlyphs) -> protocols.Examiner:
    known = stickers.concepts(glyphs)
    judge = ReadingJudge(JudgeConfig(concepts=tuple(c.name for c in known), colours=stickers.COLOURS, size=SIZE))
    config = protocols.EvaluationConfig(num_prompts=22, num_distance=24, resamples=10)
    index = FakeIndex()
    made = protocols.Examiner(pipe=FakePipe(index), judge=judge.eval(), config=config, glyphs=glyphs)
    for concept in stickers.of_split(known, "train"):
        scenes = [stickers.one_object_scene(concept, colour, 5) for colour in ("red", "blue", "black")]
        index.add([SourceImage(f"index/{concept.name}-{i}.png", "", p.copy) for i, p in enumerate(made.render(scenes))])
    return made


def test_right_concepts_are_found_for_everyday_words(
    examiner: protocols.Examiner, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, held_out = CHOSEN[0].name, CHOSEN[1].name, CHOSEN[4].name
    words = {f"my {first}": (first,), f"no {second}": (first,), "unseen": (held_out,)}
    monkeypatch.setattr(stickers, "everyday_words", lambda: words)
    section = protocols.understands_text(examiner)
    assert section.rows[0].estimate.count == 2, "held-out concepts are left aside"
    assert section.details[f"my {first}"]["right"]


def test_the_generated_the_retrieved_and_the_ceilings_stand_side_by_side(examiner: protocols.Examiner) -> None:
    section = protocols.draws_what_is_asked(examiner)
    assert section.value("concept, top-1", "real renders") == 1
    assert section.value("background colour", "real renders") == 1
    assert section.value("concept, top-1", "generated") == 1, "every training concept is in the index"
    assert section.value("concept, top-1", "retrieval alone") == 1
    assert section.value("background colour", "retrieval alone") < 0.5, "the index has three of eleven backgrounds"
    assert {row.of for row in section.rows} == {
        "generated", "retrieval alone", "tokenizer reconstructions", "real renders"
    }  # fmt: skip


def test_without_neighbors_there_is_no_retrieval_row(examiner: protocols.Examiner) -> None:
    lone = protocols.Examiner(
        pipe=examiner.pipe, judge=examiner.judge, glyphs=examiner.glyphs,
        config=protocols.EvaluationConfig(num_prompts=5, num_distance=10, k=0),
    )  # fmt: skip
    assert "retrieval alone" not in {row.of for row in protocols.draws_what_is_asked(lone).rows}


def test_unseen_concepts_are_drawn_once_their_pictures_are_added_and_the_index_is_left_as_it_was(
    examiner: protocols.Examiner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocols, "TOP_K", 1)  # six concepts: among five nearly everything would count
    own, size = examiner.pipe.index, len(examiner.pipe.index)
    section = protocols.adapts(examiner)
    assert section.value("concept, top-1", "generated, before") == 0
    assert section.value("concept, top-1", "generated, after") == 1
    assert examiner.pipe.index is own
    assert len(own) == size


def test_every_prompt_has_its_own_seed_and_before_and_after_share_them(examiner: protocols.Examiner) -> None:
    protocols.adapts(examiner)
    seeds = [asked["seed"] for asked in examiner.pipe.asked]
    assert len(set(seeds[:22])) == 22
    assert seeds[:22] == seeds[22:]


def test_real_pictures_are_nearer_to_other_scenes_than_copies_of_a_few(examiner: protocols.Examiner) -> None:
    section = protocols.frechet(examiner)
    for measure in ("FD∞", "KID"):
        assert section.value(measure, "real renders") < section.value(measure, "generated")
        real = next(row.estimate for row in section.rows if (row.measure, row.of) == (measure, "real renders"))
        assert real.low < 0 < real.high, f"real against real is nothing but for chance: {measure}"
    assert {row.estimate.count for row in section.rows} == {24}


def test_reconstructions_are_nearer_to_their_own_scenes_than_the_bias_of_other_scenes(
    examiner: protocols.Examiner,
) -> None:
    section = protocols.frechet(examiner)
    own = examining.reference_features(examiner, examining.REFERENCE_SEED)
    others = examining.reference_features(examiner, examining.CEILING_SEED)
    assert section.value("Fréchet distance", "tokenizer reconstructions") < frechet.frechet_distance(own, others)


def test_guidance_is_chosen_by_the_distance_on_validation_captions(examiner: protocols.Examiner) -> None:
    best, section = protocols.choose_guidance(examiner, (200.0, 1.0, 150.0))
    assert best == 1.0
    assert section.details == {"chosen": 1.0}
    validation = {stickers.caption(s) for s in examining.distance_scenes(examiner, examining.VALIDATION_SEED)}
    assert {asked["prompt"] for asked in examiner.pipe.asked} <= validation
    reference = {stickers.caption(s) for s in examining.distance_scenes(examiner, examining.REFERENCE_SEED)}
    assert not validation & reference


def test_distances_are_compared_draw_by_draw(examiner: protocols.Examiner) -> None:
    drawn = examining.drawn_features(examiner, examining.REFERENCE_SEED)
    rows = protocols.compare_distances(examiner, {"a": drawn, "same": drawn})
    assert rows[-1].of == "a / same"
    assert (rows[-1].estimate.low, rows[-1].estimate.value, rows[-1].estimate.high) == (1, 1, 1)


def test_a_source_names_its_longest_concepts(examiner: protocols.Examiner) -> None:
    names = {"dog", "hot dog", "cat face", "cat"}
    assert examining.shown_in("stickers/Hot-Dog_3.png", names) == {"hot dog"}
    assert examining.shown_in("a cat next to a dog", names) == {"cat", "dog"}
    assert examining.shown_in("category", names) == set()


def test_a_whole_evaluation_writes_json_markdown_and_pictures(
    examiner: protocols.Examiner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stickers, "everyday_words", lambda: {"thing": (CHOSEN[0].name,)})
    monkeypatch.setattr(protocols, "load_judge", lambda folder: examiner.judge)
    seen: list[str] = []
    report = protocols.evaluate(
        examiner.pipe, tmp_path, tmp_path / "out", num_prompts=12, glyphs=examiner.glyphs,
        progress=lambda what, done, total: seen.append(what), config=examiner.config,
    )  # fmt: skip
    page = (tmp_path / "out" / "report.md").read_text()
    assert stickers.split_digest() in page
    assert "| concept, top-5 | generated |" in page
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored == json.loads(json.dumps(report.to_dict()))
    assert [section["name"] for section in stored["sections"]] == list(protocols.PROTOCOLS)
    assert {"command", "hardware", "commit", "judge", "settings"} <= stored["facts"].keys()
    assert (tmp_path / "out" / "pictures.png").is_file()
    assert "drawing what is asked" in seen


class PipeWithoutIndex(FakePipe):
    """One whose denoiser was trained without neighbors."""

    def __init__(self, source: FakePipe) -> None:
        self._source, self.model, self.tokenizer, self.asked = source, source.model, source.tokenizer, source.asked

    index = None  # type: ignore[assignment]

    def __call__(self, prompt: str, **settings: Any) -> Any:
        return self._source(prompt, **settings | {"k": 0})


def test_a_model_without_an_index_is_put_to_what_needs_none_and_its_report_is_saved(
    examiner: protocols.Examiner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocols, "load_judge", lambda folder: examiner.judge)
    pipe, asked = PipeWithoutIndex(examiner.pipe), {"glyphs": examiner.glyphs, "config": examiner.config}
    report = protocols.evaluate(pipe, tmp_path, tmp_path / "out", num_prompts=12, **asked)
    assert [section.name for section in report.sections] == ["draws", "frechet", "pictures"]
    assert "- images in the index: it has none\n" in (tmp_path / "out" / "report.md").read_text()
    examiner.pipe.asked.clear()
    with pytest.raises(
        UsageError, match=r"expected a model with an index for adapts, it has none: name one \(--index\)"
    ):
        protocols.evaluate(pipe, tmp_path, only=["draws", "adapts"], **asked)
    assert not examiner.pipe.asked, "refused before anything is drawn"


def test_a_pipeline_that_refuses_its_index_has_none() -> None:
    class Refusing:
        @property
        def index(self) -> FakeIndex:
            raise StoreError("expected an index, the model has none of its own")

    assert not examining.has_index(Refusing())


def test_what_was_measured_is_saved_when_a_later_protocol_fails(
    examiner: protocols.Examiner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(protocols, "load_judge", lambda folder: examiner.judge)
    monkeypatch.setitem(protocols.PROTOCOLS, "frechet", fail)
    with pytest.raises(KeyboardInterrupt):
        protocols.evaluate(
            examiner.pipe, tmp_path, tmp_path / "out", only=["draws", "frechet"], num_prompts=12,
            glyphs=examiner.glyphs, config=examiner.config,
        )  # fmt: skip
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [section["name"] for section in stored["sections"]] == ["draws"]


def test_a_judge_that_lacks_a_concept_is_refused_before_anything_is_drawn(examiner: protocols.Examiner) -> None:
    examiner.judge.config = replace(examiner.judge.config, concepts=("nothing", "more"))
    for protocol in (protocols.draws_what_is_asked, protocols.adapts):
        with pytest.raises(UsageError, match="expected a judge that knows every concept"):
            protocol(examiner)
    assert not examiner.pipe.asked


def test_unknown_protocols_missing_judges_and_empty_settings_are_refused(
    examiner: protocols.Examiner, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"expected a protocol .*got 'beauty'"):
        protocols.evaluate(examiner.pipe, only="beauty", glyphs=examiner.glyphs)
    with pytest.raises(CheckpointError, match="expected a judge"):
        protocols.evaluate(examiner.pipe, tmp_path, only="draws", glyphs=examiner.glyphs)
    with pytest.raises(ConfigError, match="num_prompts must be at least 1"):
        protocols.EvaluationConfig(num_prompts=0)
