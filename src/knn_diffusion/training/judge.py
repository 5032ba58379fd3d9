"""Training the judge: an independent classifier on renders of its own, roughened so that it forgives a tokenizer.

The scenes come from seeds no other part uses and show every concept, held-out ones too: the judge has to recognise what
the generator was never shown. A generated picture has passed through a tokenizer, so a judge trained on clean renders
only would grade blur and not content; half of its pictures are therefore shrunk, re-encoded or made noisy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.lib.format import open_memmap
from torch import Tensor, nn
from torch.nn import functional

from knn_diffusion import images, stickers
from knn_diffusion.checkpoint import write_json
from knn_diffusion.config import read_mapping
from knn_diffusion.device import own_defaults
from knn_diffusion.models.judge import Judge, JudgeConfig, save_judge
from knn_diffusion.progress import Progress
from knn_diffusion.randomness import derive_seed
from knn_diffusion.stickers.dataset import NamedGlyphs
from knn_diffusion.training.data import Batch
from knn_diffusion.training.loop import TrainingResult, train
from knn_diffusion.training.objective import Phase, Validation
from knn_diffusion.training.options import RunOptions
from knn_diffusion.training.plan import TrainingConfig
from knn_diffusion.training.processes import refuse_many
from knn_diffusion.training.roughening import roughen, wobble

TRAINING_SEED, VALIDATION_SEED = 900, 901
"""Data sets of the sticker world kept for the judge: no other part may draw from them."""

CHUNK = 1_000
NO_CONCEPT = -1


@dataclass(frozen=True, slots=True)
class JudgeDataset:
    """Renders with what they show; `concepts` has a second column for pairs, NO_CONCEPT where there is one object."""

    pixels: UInt8[np.ndarray, "items height width 3"]
    concepts: Int[np.ndarray, "items 2"]
    colours: Int[np.ndarray, "items"]
    roughened: bool = True

    def __len__(self) -> int:
        return len(self.pixels)

    def batch(self, indices: Int[Tensor, "batch"], generator: torch.Generator) -> Batch:
        """`pixels` in [-1, 1], `concepts` [batch, 2] and `colours` [batch]."""
        rows = indices.numpy()
        pixels = images.pixels_from_uint8(self.pixels[rows])
        if self.roughened:
            pixels = roughen(wobble(pixels, generator), generator)
        concepts, colours = torch.from_numpy(self.concepts[rows]), torch.from_numpy(self.colours[rows])
        return {"pixels": pixels, "concepts": concepts, "colours": colours}


class JudgeObjective:
    """Cross-entropy of the concept, half of it for each object of a pair, plus a share of that of the colour."""

    def __init__(
        self, judge: Judge, validation: JudgeDataset, *, colour_weight: float = 0.3, label_smoothing: float = 0.05
    ) -> None:
        self.network: nn.Module = judge
        self.modules: nn.Module = judge
        self.parameters = list(judge.parameters())
        self.validation = validation
        self.colour_weight = colour_weight
        self.label_smoothing = label_smoothing
        self.settings: Mapping[str, object] = {"colour_weight": colour_weight, "label_smoothing": label_smoothing}

    def phases(self) -> list[Phase]:
        """One loss over all parameters."""
        return [Phase("judge", self.parameters, self._loss)]

    def _loss(self, batch: Batch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        verdict = self.network(batch["pixels"])
        concept = concept_loss(verdict.concept.float(), batch["concepts"], self.label_smoothing)
        colour = functional.cross_entropy(verdict.colour.float(), batch["colours"])
        return {"loss": concept + self.colour_weight * colour, "concept": concept, "colour": colour}

    def validate(self, network: nn.Module, step: int, generator: torch.Generator) -> Validation:
        """Accuracy on fresh renders of one object, clean and roughened."""
        clean = accuracies(network, self.validation)
        rough = accuracies(network, replace(self.validation, roughened=True))
        return Validation(metrics=clean | {f"rough_{name}": value for name, value in rough.items()})

    def export(self, network: nn.Module, folder: Path, facts: Mapping[str, object]) -> None:
        """Write the judge as a part folder."""
        assert isinstance(network, Judge)
        save_judge(network, folder, dict(facts) | {"split_digest": stickers.split_digest(), "data_seed": TRAINING_SEED})


def default_training(num_steps: int = 4_500) -> TrainingConfig:
    """The judge's training: about 20 minutes on one CPU core with bfloat16 arithmetic, a minute on a GPU."""
    return TrainingConfig(
        num_steps=num_steps,
        batch_size=128,
        learning_rate=3e-3,
        warmup_steps=min(200, num_steps // 10),
        betas=(0.9, 0.99),
        weight_decay=0.05,
        clip_norm=5.0,
        ema_decay=0.998,
        validate_every=500,
        checkpoint_every=500,
    )


@own_defaults()
def train_judge(
    options: RunOptions,
    config: TrainingConfig | None = None,
    *,
    judge: JudgeConfig | None = None,
    num_images: int = 60_000,
    num_validation: int = 2_000,
    glyphs: NamedGlyphs | None = None,
    processes: int = 1,
) -> TrainingResult:
    """Render the judge's data once (kept under `output`/data) and train it into `output`/model.

    Args:
        judge: its size; by default the full one.
        processes: for the rendering; more than one needs a main module that other processes can import.

    Raises: MissingDependencyError without the emoji font; what `train` raises.
    """
    refuse_many("judge", "data are drawn for one")
    chosen = default_training() if config is None else config
    built = new_judge(default_judge(glyphs) if judge is None else judge, chosen.seed)

    def render(name: str, count: int, seed: int, pairs: bool) -> JudgeDataset:
        place, size = options.output / "data" / name, built.config.size
        return render_dataset(
            place, count, seed, size, pairs=pairs, glyphs=glyphs, processes=processes, report=options.report
        )

    training = render("training", num_images, TRAINING_SEED, True)
    validation = replace(render("validation", num_validation, VALIDATION_SEED, False), roughened=False)
    objective = JudgeObjective(built, validation)
    return train(objective, training, chosen, options)


def default_judge(glyphs: NamedGlyphs | None = None) -> JudgeConfig:
    """The full judge: every concept the glyphs can draw, every background colour, 64 pixels."""
    return JudgeConfig(concepts=tuple(concept.name for concept in stickers.concepts(glyphs)), colours=stickers.COLOURS)


def new_judge(config: JudgeConfig, seed: int = 0) -> Judge:
    """An untrained judge whose weights follow from the seed; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "judge weights"))
        return Judge(config)


def concept_loss(
    logits: Float[Tensor, "batch concepts"], concepts: Int[Tensor, "batch 2"], label_smoothing: float
) -> Float[Tensor, ""]:
    """Cross-entropy against the objects shown, each with an equal share of the target."""
    shown = concepts != NO_CONCEPT
    log_probs = logits.log_softmax(-1)
    picked = log_probs.gather(1, concepts.clamp(min=0)) * shown
    aimed = picked.sum(1) / shown.sum(1)
    return -((1 - label_smoothing) * aimed + label_smoothing * log_probs.mean(1)).mean()


@torch.no_grad()
def accuracies(network: nn.Module, dataset: JudgeDataset, batch_size: int = 250) -> dict[str, float]:
    """top1 and top5 of the concept and top1 of the background colour, over renders of one object."""
    device = next(network.parameters()).device
    generator = torch.Generator().manual_seed(VALIDATION_SEED)
    hits = torch.zeros(3)
    for start in range(0, len(dataset), batch_size):
        batch = dataset.batch(torch.arange(start, min(len(dataset), start + batch_size)), generator)
        verdict = network(batch["pixels"].to(device))
        found = verdict.concept.cpu().topk(min(5, verdict.concept.shape[1])).indices == batch["concepts"][:, :1]
        coloured = verdict.colour.cpu().argmax(1) == batch["colours"]
        hits += torch.stack([found[:, 0].sum(), found.any(1).sum(), coloured.sum()])
    return dict(zip(("top1", "top5", "colour"), (hits / len(dataset)).tolist(), strict=True))


def render_dataset(
    folder: Path,
    count: int,
    seed: int,
    size: int,
    *,
    pairs: bool = True,
    glyphs: NamedGlyphs | None = None,
    processes: int = 1,
    report: Progress | None = None,
) -> JudgeDataset:
    """Renders of all concepts with their labels, made once and memory-mapped; every fifth shows a pair, or none does.

    Raises: MissingDependencyError without the emoji font.
    """
    scenes = _scenes(count, seed, pairs, glyphs)
    place = {concept.name: number for number, concept in enumerate(stickers.concepts(glyphs))}
    labels = [[place[thing.name] for thing in scene.things] + [NO_CONCEPT] for scene in scenes]
    colours = [stickers.COLOURS.index(scene.background_colour) for scene in scenes]
    facts = {"count": count, "seed": seed, "size": size, "pairs": pairs, "split_digest": stickers.split_digest()}
    if not _is_rendered(folder, facts):
        drawn = _drawn(scenes, size, glyphs, processes)
        _write_pixels(folder / "pixels.npy", drawn, (count, size, size, 3), report)
        write_json(folder / "done.json", facts)
    return JudgeDataset(
        open_memmap(folder / "pixels.npy", "r"),
        np.array([label[:2] for label in labels], np.int64),
        np.array(colours, np.int64),
    )


def _scenes(count: int, seed: int, pairs: bool, glyphs: NamedGlyphs | None) -> list[stickers.Scene]:
    """Scenes of one object, and for every four of them one of a pair if asked."""
    drawn = stickers.sample_scenes(count * 2 + 20, seed, "all", glyphs)
    single = iter([scene for scene in drawn if len(scene.things) == 1])
    paired = iter([scene for scene in drawn if len(scene.things) == 2])
    return [next(paired if pairs and number % 5 == 4 else single) for number in range(count)]


def _is_rendered(folder: Path, facts: dict[str, object]) -> bool:
    done = folder / "done.json"
    if done.is_file() and read_mapping(done) == facts:
        return True
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    return False


def _drawn(
    scenes: list[stickers.Scene], size: int, glyphs: NamedGlyphs | None, processes: int
) -> Iterator[UInt8[np.ndarray, "chunk height width 3"]]:
    for start in range(0, len(scenes), CHUNK * processes):
        yield stickers.render_array(scenes[start : start + CHUNK * processes], size, glyphs, processes)


def _write_pixels(
    path: Path,
    chunks: Iterator[UInt8[np.ndarray, "chunk height width 3"]],
    shape: tuple[int, int, int, int],
    report: Progress | None,
) -> None:
    pixels, done = open_memmap(path, "w+", np.uint8, shape), 0
    for chunk in chunks:
        pixels[done : done + len(chunk)] = chunk
        done += len(chunk)
        if report is not None:
            report("drawing pictures", done, shape[0])
    pixels.flush()
