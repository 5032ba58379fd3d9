"""Algorithm 1: the denoiser learns to undo noise on an image's tokens, given its own embedding and its neighbors'.

No caption is read anywhere in this file or in what it trains on.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from torch import Tensor, nn

from knn_diffusion.checkpoint import CONFIG_FILE, atomic_folder, save_part
from knn_diffusion.compiler import compile_module
from knn_diffusion.config import config, read_mapping, require, to_dict
from knn_diffusion.device import choose_dtype, device_name, full_memory_told, own_defaults
from knn_diffusion.diffusion.conditioning import drop_condition, drop_query, lafite_noise, make_condition, with_null
from knn_diffusion.diffusion.losses import LossConfig, StepSampler, diffusion_loss, uncertain
from knn_diffusion.diffusion.plan import SamplerConfig
from knn_diffusion.diffusion.process import Schedule, q_sample
from knn_diffusion.diffusion.sampling import sample
from knn_diffusion.errors import ConfigError, FingerprintError, TrainingError, UsageError
from knn_diffusion.image_index import ImageIndex
from knn_diffusion.images import from_array, grid, uint8_from_pixels
from knn_diffusion.model_folder import (
    load_denoiser,
    read_pipeline_file,
    resolve_model,
    write_pipeline_file,
)
from knn_diffusion.models.denoiser import Denoiser, DenoiserConfig
from knn_diffusion.models.encoders import save_encoder
from knn_diffusion.models.tokenizer_protocol import Tokenizer
from knn_diffusion.models.tokenizers import load_tokenizer
from knn_diffusion.randomness import generator_for
from knn_diffusion.shapes import Condition
from knn_diffusion.training.activations import Activations, denoiser_activations
from knn_diffusion.training.conditioning import ConditioningConfig
from knn_diffusion.training.data import Batch
from knn_diffusion.training.loop import TrainingResult, check_output, train
from knn_diffusion.training.neighbors import DenoiserData, prepare
from knn_diffusion.training.objective import Phase, Validation
from knn_diffusion.training.options import RunOptions
from knn_diffusion.training.plan import TrainingConfig
from knn_diffusion.training.processes import joined
from knn_diffusion.training.tokens import examples_of, frozen_for_all

PREVIEWS = 8


@config
class DenoiserRun:
    """Everything that decides how a denoiser turns out, but its data."""

    denoiser: DenoiserConfig
    schedule: Schedule
    training: TrainingConfig
    conditioning: ConditioningConfig = ConditioningConfig()
    loss: LossConfig = LossConfig()
    step_sampling: Literal["uniform", "importance"] = "uniform"
    """How the step n of each image is drawn: Algorithm 1's way, or VQ-Diffusion's."""

    def __post_init__(self) -> None:
        steps, codes = self.denoiser.num_steps, self.denoiser.vocab_size
        require(
            self.schedule.num_steps == steps,
            "schedule.num_steps",
            self.schedule.num_steps,
            f"denoiser.num_steps, {steps}",
        )
        require(
            self.schedule.vocab_size == codes,
            "schedule.vocab_size",
            self.schedule.vocab_size,
            f"denoiser.vocab_size, {codes}",
        )
        read = self.denoiser.grid_neighbors
        require(self.conditioning.k >= read, "conditioning.k", self.conditioning.k, f"at least grid_neighbors, {read}")


class DenoiserObjective:
    """Algorithm 1 over cached tokens, embeddings and neighbor lists; an `Objective` of the training loop."""

    def __init__(
        self, run: DenoiserRun, validation: DenoiserData, tokenizer: Tokenizer, encoder_fingerprint: str
    ) -> None:
        self.run = run
        self.settings: Mapping[str, object] = to_dict(run)
        self.validation = validation
        self.tokenizer = tokenizer
        self.encoder_fingerprint = encoder_fingerprint
        self.denoiser = Denoiser(run.denoiser)
        if self.denoiser.code_traits is not None:
            self.denoiser.code_traits.take(tokenizer.codes)
        self.step_sampler = StepSampler(run.schedule.num_steps, run.step_sampling)
        steps = min(16, run.schedule.num_steps)
        self.sampler = SamplerConfig(num_steps=steps, order="halton", guidance_scale=1.5)
        self.k, self.query_weight, self.agreement = run.conditioning.k, 1.0, 0.0
        self.network: nn.Module = self.denoiser
        self.predict: nn.Module = self.denoiser
        self.modules: nn.Module = nn.ModuleDict({"denoiser": self.denoiser, "step_sampler": self.step_sampler})

    def phases(self) -> list[Phase]:
        """One: lines 3-16 of Algorithm 1."""
        every, matrices = list(self.denoiser.parameters()), self.denoiser.hidden_matrices
        return [Phase("denoiser", every, self.loss, matrices=matrices, remember=self.remember)]

    def shards(self, network: nn.Module) -> list[list[nn.Module]]:
        """The groups that the denoiser names."""
        assert isinstance(network, Denoiser)
        return network.shards

    def compile_blocks(self) -> None:
        """All blocks are of one shape, so that torch compiles one of them."""
        for block in self.denoiser.blocks:
            compile_module(block)

    def recompute_activations(self) -> None:
        """Keep only what enters each block."""
        self.denoiser.activation_checkpointing = True

    def activations(self, *, bfloat16: bool, recomputed: bool) -> Activations:
        """Counted from the configuration."""
        schedule, neighbors = self.run.schedule, self.run.conditioning.k
        loss = {"replaces": schedule.replaces, "masks_only": schedule.preset == "absorbing"}
        return denoiser_activations(self.run.denoiser, neighbors, bfloat16=bfloat16, recomputed=recomputed, **loss)

    def loss(self, batch: Batch, step: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Lines 4-14 of Algorithm 1 for a batch of images, in nats per token."""
        x_0 = batch["tokens"]  # 4, 7: an image's tokens, made once before training
        y = self.condition(batch, generator)  # 5, 6: its embedding and its neighbors', found once before training
        n, probability = self.step_sampler.sample(len(x_0), generator)  # 8
        x_n = q_sample(self.run.schedule, x_0, n, generator)  # 9
        logits = self.predict(x_n, n, y, uncertain(self.run.schedule, x_n))
        parts = diffusion_loss(  # 10-14
            self.run.schedule, logits, x_0, x_n, step=n, probability=probability, config=self.run.loss
        )
        # Over N, so that with uniform steps the number is Algorithm 1's; gradient clipping then means the same for every N.
        loss = parts.total / self.run.schedule.num_steps
        return {"loss": loss, "x_0": parts.l_x0.mean(), "step": n, "bound": parts.bound}

    def remember(self, seen: Mapping[str, Tensor]) -> None:
        """Let the step sampler know the losses of the whole batch."""
        self.step_sampler.update(seen["step"], seen["bound"])

    def condition(self, batch: Batch, generator: torch.Generator) -> Condition:
        """y of Eq. 4, with what training hides of it."""
        settings = self.run.conditioning
        query = batch["query"]
        if settings.query_noise > 0:
            query = lafite_noise(query, settings.query_noise, generator)
        y = condition_of(batch, query)
        y = drop_query(y, settings.query_dropout, generator)
        return drop_condition(y, settings.condition_dropout, generator)

    def validate(self, network: nn.Module, step: int, generator: torch.Generator) -> Validation:
        """Loss on images kept out of training, and pictures drawn for some of them from their neighbors alone."""
        device = next(network.parameters()).device
        items = torch.arange(len(self.validation))
        losses = []
        for part in items.split(self.run.training.batch_size):
            batch = {name: value.to(device) for name, value in self.validation.batch(part, torch.Generator()).items()}
            y = condition_of(batch, batch["query"])
            n = torch.randint(1, self.run.schedule.num_steps + 1, (len(part),), generator=generator, device=device)
            x_n = q_sample(self.run.schedule, batch["tokens"], n, generator)
            for few in torch.arange(len(part), device=device).split(self.run.training.micro_batch_size or len(part)):
                y_few = y.select(few)
                parts = diffusion_loss(
                    self.run.schedule,
                    network(x_n[few], n[few], y_few, uncertain(self.run.schedule, x_n[few])),
                    batch["tokens"][few],
                    x_n[few],
                    step=n[few],
                    probability=torch.full((len(few),), 1 / self.run.schedule.num_steps, device=device),
                    config=self.run.loss,
                )
                losses.append(torch.stack([parts.bound.sum() * self.run.schedule.num_steps, parts.l_x0.sum()]))
        bound, x_0 = (torch.stack(losses).sum(0) / len(items)).tolist()
        return Validation(metrics={"bound": bound, "x_0": x_0}, preview=self._preview(network, device))

    def _preview(self, network: nn.Module, device: torch.device) -> Image.Image:
        """Top row: images that training never saw, as the tokenizer gives them back; below: drawn from their neighbors."""
        count = min(PREVIEWS, len(self.validation))
        batch = self.validation.batch(torch.arange(count), torch.Generator())
        batch = {name: value.to(device) for name, value in batch.items()}
        y = drop_query(condition_of(batch, batch["query"]), 1.0, torch.Generator())
        assert isinstance(network, Denoiser)
        both = network.prepare(with_null(y))
        tokens = sample(
            network,
            self.run.schedule,
            both.select(slice(0, count)),
            both,
            config=SamplerConfig(num_steps=min(16, self.run.schedule.num_steps), guidance_scale=2.0),
            grid=self.run.denoiser.grid,
            generators=[generator_for("preview", number) for number in range(count)],
            device=device,
        )
        self.tokenizer.to(device)
        rows = [self.tokenizer.decode(t) for t in (batch["tokens"], tokens)]
        return grid([from_array(array) for row in rows for array in uint8_from_pixels(row)], columns=count, cell=96)

    def start_from(self, model: Path) -> None:
        """Take the weights of a model's denoiser, of the same shape, and the way the model draws.

        Whether it draws with neighbors at all is this run's to say (the paper's baselines have none).

        Raises: FingerprintError when it was trained with another encoder; ConfigError when its shape differs.
        """
        folder, drawing = model / "denoiser", read_pipeline_file(model)
        self.sampler = drawing.sampler
        self.query_weight, self.agreement = drawing.query_weight, drawing.agreement
        self.k = (drawing.k or self.k) if self.k else 0
        trained, schedule, facts = load_denoiser(folder)
        if facts.get("encoder") != self.encoder_fingerprint:
            raise FingerprintError(
                f"{folder} was trained with the encoder {str(facts.get('encoder'))[:24]}, the index with "
                f"{self.encoder_fingerprint[:24]}: build the index with that model's encoder"
            )
        there = to_dict(trained.config) | to_dict(schedule)
        asked = to_dict(self.run.denoiser) | to_dict(self.run.schedule)
        if others := [f"{name} {asked[name]} for {value}" for name, value in there.items() if asked[name] != value]:
            raise ConfigError(
                f"expected the shape and schedule of {folder}, got {', '.join(others)}: leave out --preset and --config, "
                "or start without --init"
            )
        self.denoiser.load_state_dict(trained.state_dict())

    def export(self, network: nn.Module, folder: Path, facts: Mapping[str, object]) -> None:
        """Write the denoiser in half precision with its schedule and its encoder's fingerprint, and the model around it."""
        weights = {name: value.half() for name, value in network.state_dict().items()}
        extra = {
            "encoder": self.encoder_fingerprint,
            "schedule": to_dict(self.run.schedule),
            "run": to_dict(self.run),
            **facts,
        }
        save_part(folder / "denoiser", kind="denoiser", config=self.run.denoiser, weights=weights, extra=extra)
        write_pipeline_file(
            folder,
            name=folder.absolute().parent.name,
            sampler=self.sampler,
            k=self.k,
            query_weight=self.query_weight,
            agreement=self.agreement,
            facts=dict(facts),
        )


def condition_of(batch: Batch, query: Tensor) -> Condition:
    """y of Eq. 4 for a batch of `DenoiserData`."""
    return make_condition(query, batch["neighbors"], batch["present"], batch.get("grids"), batch.get("grids_present"))


@own_defaults()
def train_denoiser(
    run: DenoiserRun,
    sources: Sequence[str | Path],
    index: ImageIndex,
    options: RunOptions,
    *,
    tokenizer: Path | None = None,
    tokens: Path | None = None,
    init: str | Path | None = None,
) -> TrainingResult:
    """Algorithm 1 over a folder of images and an index: leaves a whole model in `output/model`.

    Under torchrun all processes call this: they share the tokenizing, the first looks up the neighbors, then all train.

    Args:
        sources: image folders, files or shards; usually the ones the index was built from. None: all that `tokens` holds.
        tokens: folder of tokens and embeddings, as `ImageIndex.add` makes it; what it lacks is added. None: one in `output`.
        tokenizer: folder of a trained tokenizer; not needed with `init`.
        init: bundled name or folder of a model to go on from: its tokenizer is used, its denoiser's weights start the run.

    Raises: UsageError when there is neither a tokenizer nor a model to go on from, the tokenizer is of another size than the
        denoiser, the images are too few, or a resumed run was begun with others;
        FingerprintError when that model was trained with another encoder than the index; what `train` raises.
    """
    output, cache = options.output, options.output / "cache"
    with joined(options.device) as processes:
        told = options if processes.first else options.silent()
        full_told = partial(full_memory_told, partial(_no_room_to_prepare, processes.device))
        with processes.together(), full_told():
            if processes.first:
                check_output(output, options.resume)
            choose_dtype(processes.device, run.training.precision)
            tokenizer_folder = _tokenizer_folder(tokenizer, init)
            parts, _ = load_tokenizer(tokenizer_folder)
            check_tokenizer(run.denoiser, parts)
            check_same_parts(output / "model", tokenizer_folder, index.encoder.fingerprint)
            parts.to(processes.device)
        with full_told():
            examples = examples_of(sources, index, parts, tokens, processes, told)
            frozen = frozen_for_all(index, processes, told)
        with processes.first_goes_first(), full_told():
            settings, grid_m = run.conditioning, run.denoiser.grid_neighbors
            data = prepare(examples, frozen, settings.k, cache, told, shown=settings, grid_m=grid_m)
            training, validation = data.split(validation_count(len(data)))
            objective = DenoiserObjective(run, validation, parts, index.encoder.fingerprint)
            if processes.first:
                lay_out(output / "model", tokenizer_folder, index)
            if init is not None:
                objective.start_from(resolve_model(init))
        return train(objective, training, run.training, told, processes)


def lay_out(folder: Path, tokenizer: Path, index: ImageIndex) -> None:
    """Put the parts that do not change into a model folder without a denoiser, so that every export completes a usable model."""
    if not (folder / "denoiser").is_dir():
        with atomic_folder(folder / "tokenizer") as temporary:
            shutil.copytree(tokenizer, temporary, dirs_exist_ok=True)
        save_encoder(index.encoder, folder / "encoder")


def check_same_parts(folder: Path, tokenizer: Path, encoder: str) -> None:
    """Hold tokenizer and encoder (its fingerprint) against those that the denoiser in a model folder, if any, was trained with.

    Raises: UsageError when it was trained with others.
    """
    if not (folder / "denoiser").is_dir():
        return
    trained = read_mapping(folder / "denoiser" / CONFIG_FILE).get("extra", {})
    codes = [read_mapping(place / CONFIG_FILE).get("weights_sha256") for place in (folder / "tokenizer", tokenizer)]
    for part, before, asked in (("encoder", trained.get("encoder"), encoder), ("tokenizer", *codes)):
        if before != asked:
            raise UsageError(
                f"{folder} was trained with the {part} {str(before)[:12]}, got {str(asked)[:12]}: go on with that "
                f"{part} or choose another --output"
            )


def _no_room_to_prepare(device: torch.device) -> TrainingError:
    return TrainingError(
        f"memory ran out on {device_name(device)} while the images' tokens and neighbors were prepared: free it of other "
        "programs, or prepare them with --device cpu --max-minutes 1, then go on with --resume on the GPU"
    )


def check_tokenizer(config: DenoiserConfig, tokenizer: Tokenizer) -> None:
    """Hold the sizes of a denoiser to be trained against its tokenizer.

    Raises: UsageError when vocabulary, grid or width of the codes differ.
    """
    sizes = {"vocab_size": tokenizer.vocab_size, "grid": tokenizer.grid}
    sizes |= {"code_dim": tokenizer.codes.shape[1]} if config.code_dim else {}
    for name, got in sizes.items():
        if (asked := getattr(config, name)) != got:
            also = f" --set schedule.vocab_size={got}" if name == "vocab_size" else ""
            raise UsageError(
                f"expected a tokenizer with {name} {asked}, got one with {got}: add --set denoiser.{name}={got}{also}, or "
                "name another --tokenizer"
            )


def validation_count(items: int) -> int:
    """How many images are kept out of training to judge it: a fiftieth, 1 … 512.

    Raises: UsageError when fewer than two images are there.
    """
    if items < 2:
        raise UsageError(f"expected at least 2 images to train on, got {items}: add images")
    return min(512, max(1, items // 50))


def _tokenizer_folder(tokenizer: Path | None, init: str | Path | None) -> Path:
    if tokenizer is not None:
        return tokenizer
    if init is None:
        raise UsageError("expected a tokenizer to train on, got none: add --tokenizer DIR, or --init stickers")
    return resolve_model(init) / "tokenizer"
