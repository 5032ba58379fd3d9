"""Text in, nearest images found, new image out: Algorithm 2 of the paper from end to end.

    pipe = KnnDiffusion.from_pretrained("stickers")
    out = pipe("a red heart", num_images_per_prompt=4, seed=0)
    out.images, out.neighbors

Read on in `diffusion/sampling.py` (what `draw` calls), then in `diffusion/step.py` and `diffusion/process.py`.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar, Unpack, overload

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from knn_diffusion.device import (
    binary_size,
    choose_device,
    choose_dtype,
    computes_bfloat16,
    device_name,
    full_memory_told,
    own_defaults,
)
from knn_diffusion.diffusion.compiled import CompiledStep
from knn_diffusion.diffusion.conditioning import (
    agreeing,
    led_in_turn,
    make_condition,
    replace_first_neighbor,
    weigh_query,
    with_null,
)
from knn_diffusion.diffusion.process import q_sample
from knn_diffusion.diffusion.sampling import StepInfo, sample
from knn_diffusion.diffusion.step import Step, reverse_step
from knn_diffusion.errors import FingerprintError, KnnDiffusionError, StoreError, UsageError
from knn_diffusion.hub import check_hub_id, is_hub_id, send
from knn_diffusion.image_index import ImageIndex
from knn_diffusion.images import from_array, network_input, open_image, pixels_from_uint8, to_array, uint8_from_pixels
from knn_diffusion.model_folder import MODEL_FILES, Model, load_model, replace_model_folder, save_model
from knn_diffusion.models.text_states import text_states
from knn_diffusion.neighbor_tokens import NeighborTokens
from knn_diffusion.randomness import generator_for
from knn_diffusion.request import (
    Callback,
    Neighbor,
    NeighborList,
    Output,
    Passed,
    Request,
    Settings,
    check_prompt,
    check_request,
)
from knn_diffusion.shapes import Condition, Tokens

PLACES_AT_ONCE = {"cuda": 2048}
"""Places of the transformer that fill a kind of device, of all images and both halves of guidance; elsewhere an image's do."""

Begin = tuple[Int[Tensor, "1 seq"], int]
"""Where an edit starts: the clean tokens of the reference, and the step they are noised to."""

Deliver = Callable[[int, Sequence[Image.Image]], None]
"""Takes the images of a batch and the number of the first."""


class Retrieved(NamedTuple):
    """What a prompt finds: y, the neighbors in it, and those that were left out because they disagree with the first."""

    condition: Condition
    neighbors: NeighborList
    disagreeing: NeighborList


P, R = ParamSpec("P"), TypeVar("R")
Method = Callable[Concatenate["KnnDiffusion", P], R]


def _memory_told(method: Method[P, R]) -> Method[P, R]:
    """The method with a line for a device whose memory runs out."""

    @wraps(method)
    def told(pipe: KnnDiffusion, *args: P.args, **kwargs: P.kwargs) -> R:
        with full_memory_told(pipe._memory_ran_out):
            return method(pipe, *args, **kwargs)

    return told


class KnnDiffusion:
    """A model with the index it retrieves from. A request changes neither; `index.add` changes only the index.

    Image i of a prompt takes all its randomness from (seed, i) and runs in batches of a fixed size, so its pixels are
    the same however many images or prompts are asked for, on the same machine.
    """

    def __init__(
        self,
        model: Model,
        index: ImageIndex | None = None,
        *,
        device: str | int | torch.device = "auto",
        dtype: str = "auto",
        compile: bool = False,
    ) -> None:
        """Put a model on a device.

        Args:
            dtype: arithmetic of the denoiser: "float32", "bfloat16", or "auto", which is bfloat16 where the hardware
                computes in it.
            compile: whether to compile a pass of the sampler when the first drawing needs it, which takes a minute or more; for
                servers and long batches. Pictures may differ from uncompiled ones in a few tokens.
        Raises: MissingDependencyError where torch cannot compile.
        """
        self.model = model
        self.device = choose_device(device)
        self.dtype = choose_dtype(self.device, dtype)
        with full_memory_told(self._too_small):
            self.denoiser = deepcopy(model.denoiser).to(self.device, self.dtype).eval().requires_grad_(False)
            self.tokenizer = deepcopy(model.tokenizer).to(self.device)
        self.neighbor_tokens: NeighborTokens | None = None
        if model.denoiser.config.grid_neighbors:
            self.neighbor_tokens = NeighborTokens(self.tokenizer)
        self.step: Step = CompiledStep(self.device) if compile else reverse_step
        self.null: Tensor | None = None  # y' = 0
        if model.reads_text:
            null = text_states(model.encoder, [""])[0] if model.null is None else model.null
            self.null = null.to(self.device)
        self.micro_batch = images_at_once(self.device, model.denoiser.config.places)
        self._index: ImageIndex | None = None
        if index is not None:
            self.index = index

    @classmethod
    @own_defaults()
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        index: ImageIndex | str | Path | None = None,
        revision: str | None = None,
        device: str | int | torch.device = "auto",
        dtype: str = "auto",
        compile: bool = False,
    ) -> KnnDiffusion:
        """A bundled model ("stickers"), a model folder or one of the hub ("owner/name"), with its own index or the given one.

        Models and indexes of the hub are downloaded unless they are in its cache; what is added to such an index stays in
        memory.

        Args:
            revision: branch, tag or commit of a model of the hub.
            device, dtype, compile: as for a model.

        Raises: CheckpointError when a part is missing or damaged; FingerprintError when parts or index were made with
        different encoders; StoreError when the index is missing or damaged; HubError when the hub does not have it or
        cannot be reached.
        """
        shared = is_hub_id(name_or_folder)
        model = load_model(name_or_folder, revision)
        if index is None and model.folder is not None and (model.folder / "index").is_dir():
            index = ImageIndex.open(model.folder / "index", encoder=model.encoder, read_only=shared)
        opened = ImageIndex.open(index, encoder=model.encoder) if isinstance(index, str | Path) else index
        return cls(model, opened, device=device, dtype=dtype, compile=compile)

    @property
    def index(self) -> ImageIndex:
        """The images retrieved from; what is added to it takes effect at the next request."""
        if self._index is None:
            raise StoreError(
                f"expected an index, the model {self.model.name} has none of its own: name one (--index, index=) or build "
                "one (knn-diffusion index build)"
            )
        return self._index

    @index.setter
    def index(self, index: ImageIndex) -> None:
        made, reads = index.info(), self.model.encoder
        if made["fingerprint"] != reads.fingerprint:
            raise FingerprintError(
                f"the index was built with {made['encoder']} ({made['dim']}-d), the model {self.model.name} reads "
                f"{reads.name} ({reads.dim}-d): rebuild the index with the model's encoder"
            )
        self._index = index

    @property
    def transparent(self) -> bool:
        """True if drawings have transparency."""
        return self.model.tokenizer.alpha

    @property
    def image_size(self) -> int:
        """Side of the square images, in pixels."""
        return self.model.tokenizer.config.image_size

    @overload
    def __call__(self, prompt: str, **settings: Unpack[Settings]) -> Output: ...
    @overload
    def __call__(self, prompt: list[str] | tuple[str, ...], **settings: Unpack[Settings]) -> list[Output]: ...
    def __call__(
        self, prompt: str | list[str] | tuple[str, ...], **settings: Unpack[Settings]
    ) -> Output | list[Output]:
        """Draw images for a prompt, or for each of several.

        Args:
            settings: options as listed in `request.Settings`; for instance
                pipe("a red heart", num_images_per_prompt=4, k=10, guidance_scale=8.0, num_inference_steps=100, seed=0)
        Returns: one Output for one prompt, a list of them for a list.
        Raises: UsageError for a prompt or option that cannot be carried out.
        """
        request = self._request(settings)
        if not isinstance(prompt, list | tuple):
            return self.generate(check_prompt(prompt), request)
        prompts = [check_prompt(one) for one in prompt]
        return [self.generate(one, request) for one in prompts]

    def _request(self, settings: Settings) -> Request:
        """The checked settings; a k that nobody gave is at most what the index holds."""
        model = self.model
        k = min(model.k, max(1, len(self._index))) if self._index is not None else model.k
        if model.reads_text:
            k = 0
            if settings.get("k"):
                raise UsageError(f"expected no k, {model.name} reads the text and no neighbors: leave it out")
        return check_request(
            settings,
            sampler=model.sampler,
            k=k,
            query_weight=model.query_weight,
            agreement=model.agreement,
            reads_grids=self.neighbor_tokens is not None,
        )

    @own_defaults()
    def generate(self, prompt: str, request: Request) -> Output:
        """Algorithm 2."""
        started = time.monotonic()
        found = self.retrieve(prompt, request)
        output = partial(self._output, prompt, found, request, started)
        return output(self._images(found.condition, request, _deliverer(request, output)))

    @own_defaults()
    @_memory_told
    def edit(
        self, image: Image.Image | str | Path, prompt: str, strength: float = 0.6, **settings: Unpack[Settings]
    ) -> Output:
        """Change an image towards a prompt: Sec. 4.4.

        The image takes the first neighbor's place and leads every drawing, and the chain starts from the image's tokens noised to
        step round(strength · N). As few passes are made as that share of the whole chain has.

        Args:
            strength: 0 returns the image's own pixels, 1 starts from all [MASK].
            settings: as for a drawing; k is at least 1.
        Raises: UsageError for a prompt or option that cannot be carried out.
        """
        started = time.monotonic()
        request = replace(self._request(settings), lead="first")
        if not 0 <= strength <= 1:
            raise UsageError(f"expected strength from 0 to 1, got {strength}: 0 leaves the image, 1 starts anew")
        reference = from_array(network_input(open_image(image), self.image_size, alpha=self.tokenizer.alpha))
        found = self.retrieve(check_prompt(prompt), request)
        x_0 = self.tokenizer.encode(pixels_from_uint8(to_array(reference)[None]).to(self.device))
        condition = found.condition
        if not self.model.reads_text:
            condition = replace_first_neighbor(condition, self._embed_image(reference), x_0.cpu())
        trained = self.model.schedule.num_steps
        start_step = round(strength * trained)
        output = partial(self._output, prompt, found, request, started)
        deliver = _deliverer(request, output)
        images = [reference.copy() for _ in range(request.num_images)]
        if start_step == 0:
            deliver(0, images)
        else:
            share = replace(request.sampler, num_steps=max(1, round(request.sampler.num_steps * start_step / trained)))
            begin = (x_0, start_step) if start_step < trained else None
            images = self._images(condition, replace(request, sampler=share), deliver, begin)
        return output(images)

    @own_defaults()
    def retrieve(self, prompt: str, request: Request) -> Retrieved:
        """Algorithm 2, lines 2-4: the text's embedding and its K nearest images become y (Eq. 5), one row.

        For a denoiser of texts it is the states of the text, without any neighbors. For one that reads its neighbors' pictures the
        index's previews give the grids.

        Raises: UsageError when the index holds fewer than k images.
        """
        if self.model.reads_text:
            states = text_states(self.model.encoder, [prompt])
            y = Condition(y=states, present=torch.ones(states.shape[:2], dtype=torch.bool))
            return Retrieved(y, NeighborList(), NeighborList())
        query = self.model.encoder.encode_texts([prompt])  # 1 dim
        if request.k == 0:
            y = make_condition(torch.from_numpy(query), torch.zeros(1, 0, query.shape[1]))
            return Retrieved(y, NeighborList(), NeighborList())
        found = self.index.search(query, request.k, exclude_ids=request.exclude_ids, modality="text")
        count = request.k - int(found.shortfall[0])
        ids = found.ids[0][:count]
        neighbors = NeighborList(
            Neighbor(id=one, score=float(score), source=source)
            for one, score, source in zip(ids, found.scores[0], self.index.sources(ids), strict=False)
        )
        embeddings = torch.from_numpy(found.embeddings).float()  # 1 k dim
        agree = (torch.arange(request.k) < count)[None]
        if request.agreement > 0:
            agree = agreeing(embeddings, agree, request.agreement, self.model.denoiser.config.query_dim)
        order = (~agree[0]).int().argsort(stable=True)  # those that agree stand first
        embeddings, present = torch.where(agree[..., None], embeddings, 0)[:, order], agree[:, order]
        agreed = NeighborList(one for one, agrees in zip(neighbors, agree[0], strict=False) if agrees)
        others = NeighborList(one for one, agrees in zip(neighbors, agree[0], strict=False) if not agrees)
        weighed = weigh_query(torch.from_numpy(query), embeddings, request.query_weight)
        return Retrieved(make_condition(weighed, embeddings, present, *self._grids(agreed)), agreed, others)

    def _grids(self, neighbors: NeighborList) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Tokens of the neighbors that the denoiser reads, and which of them there are."""
        if self.neighbor_tokens is None:
            return None, None
        return self.neighbor_tokens.read(neighbors.ids, self.model.denoiser.config.grid_neighbors, self.index.preview)

    def _images(
        self, condition: Condition, request: Request, deliver: Deliver, begin: Begin | None = None
    ) -> list[Image.Image]:
        """Draw and decode batch by batch, and deliver each before the next is begun."""
        images: list[Image.Image] = []

        def decoded(tokens: Tokens) -> None:
            batch = self.decode(tokens)
            deliver(len(images), batch)
            images.extend(batch)

        self.draw(condition, range(request.num_images), request, begin, drawn=decoded)
        return images

    @own_defaults()
    @_memory_told
    @torch.inference_mode()
    def draw(
        self,
        condition: Condition,
        numbers: Sequence[int],
        request: Request,
        begin: Begin | None = None,
        drawn: Callable[[Tokens], None] | None = None,
    ) -> Tokens:
        """Algorithm 2, lines 5-10, for the images with these numbers, in batches of a fixed size.

        Args:
            condition: y, one row for all images or one row for each.
            begin: where to start instead of all [MASK].
            drawn: called with the tokens of each batch as soon as it is drawn.
        """
        tokens: list[Tokens] = []
        for first in range(0, len(numbers), self.micro_batch):
            batch = list(range(first, min(first + self.micro_batch, len(numbers))))
            padded = batch + batch[-1:] * (self.micro_batch - len(batch))  # always the same shapes
            generators = [generator_for(request.seed, numbers[i]) for i in padded]
            y = Condition.cat([_row(condition, i, numbers[i], request) for i in padded]).to(self.device)
            x_0 = self._chain(y, generators, request, begin, _watch(request.callback, numbers, batch, self.micro_batch))
            tokens.append(x_0[: len(batch)])
            if drawn is not None:
                drawn(tokens[-1])
        return torch.cat(tokens)

    def _chain(
        self,
        y: Condition,
        generators: list[torch.Generator],
        request: Request,
        begin: Begin | None,
        watch: Callable[[StepInfo], None] | None,
    ) -> Tokens:
        """One batch through the sampler; keys and values of y are made once, both guidance halves run together."""
        both = self.denoiser.prepare(with_null(y, self.null))
        x_start, start_step = None, None
        if begin is not None:
            x_0, start_step = begin[0].expand(len(generators), -1), begin[1]
            steps = torch.full((len(generators),), start_step, device=self.device)
            x_start = q_sample(self.model.schedule, x_0, steps, generators)
        return sample(
            self.denoiser,
            self.model.schedule,
            both.select(slice(0, len(generators))),
            both,
            config=request.sampler,
            grid=self.tokenizer.grid,
            generators=generators,
            x_start=x_start,
            start_step=start_step,
            callback=watch,
            device=self.device,
            step=self.step,
        )

    @own_defaults()
    @_memory_told
    @torch.inference_mode()
    def decode(self, tokens: Tokens) -> list[Image.Image]:
        """Algorithm 2, line 11, in batches of the same fixed size."""
        images: list[Image.Image] = []
        for first in range(0, len(tokens), self.micro_batch):
            batch = tokens[first : first + self.micro_batch]
            padded = torch.cat([batch, batch[-1:].expand(self.micro_batch - len(batch), -1)])
            images += [from_array(array) for array in uint8_from_pixels(self.tokenizer.decode(padded))[: len(batch)]]
        return images

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write model, index and model card; a model that is there already is replaced in one step.

        Raises: UsageError when the folder holds anything but a model; KnnDiffusionError when the disk is full.
        """
        place = Path(folder)
        with replace_model_folder(place) as temporary:
            self._write(temporary)
        kept = self._index.folder if self._index is not None else None
        if self._index is not None and kept is not None and kept.absolute() == (place / "index").absolute():
            self._index.close()  # its files are no longer there
            self.index = ImageIndex.open(place / "index", encoder=self.model.encoder)
        return place

    def push_to_hub(self, repository: str, *, private: bool = False, revision: str | None = None) -> str:
        """Send model, index and model card to the Hugging Face hub, into a new repository or over the model there.

        Args:
            repository: `owner/name`.
            private: whether a new repository is seen by its owner only.
            revision: an existing branch; None is the main one.

        Returns: where it can be seen.
        Raises: UsageError for another name; HubError when the hub refuses or cannot be reached; KnnDiffusionError when there
            is no room for the copy that is sent; MissingDependencyError without huggingface_hub.
        """
        check_hub_id(repository)
        with tempfile.TemporaryDirectory(prefix="knn-diffusion-") as temporary:
            self._write(Path(temporary), sealed=True)
            return send(Path(temporary), repository, MODEL_FILES, private=private, revision=revision)

    def _write(self, folder: Path, *, sealed: bool = False) -> None:
        save_model(self.model, folder)
        if self._index is not None:
            self._index.save(folder / "index", sealed=sealed)

    def _memory_ran_out(self) -> KnnDiffusionError:
        images = "1 image" if self.micro_batch == 1 else f"{self.micro_batch} images at once"
        fewer = [f"set pipe.micro_batch = {self.micro_batch // 2}"] if self.micro_batch > 1 else []
        return KnnDiffusionError(
            f"memory ran out on {device_name(self.device)} while drawing {images} in {_name(self.dtype)}: {self._lighter(fewer)}"
        )

    def _too_small(self) -> KnnDiffusionError:
        weights = sum(parameter.numel() for parameter in self.model.denoiser.parameters()) * self.dtype.itemsize
        return KnnDiffusionError(
            f"expected {binary_size(weights)} of memory on {device_name(self.device)} for the denoiser in "
            f"{_name(self.dtype)}, and some for the tokenizer, got less: {self._lighter([])}"
        )

    def _lighter(self, options: list[str]) -> str:
        """What needs less memory, these options of Python's among it."""
        if self.dtype == torch.float32 and computes_bfloat16(self.device):
            options = [*options, 'ask for dtype="bfloat16"']
        in_python = f", or in Python {' or '.join(options)}" if options else ""
        return f"free it of other programs, or compute on --device cpu{in_python}"

    def _embed_image(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(self.model.encoder.encode_images([image]))

    def _output(
        self, prompt: str, found: Retrieved, request: Request, started: float, images: list[Image.Image]
    ) -> Output:
        grids = found.condition.grids_present
        return Output(
            prompt=prompt,
            images=images,
            neighbors=found.neighbors,
            disagreeing=found.disagreeing,
            shortfall=request.k - len(found.neighbors) - len(found.disagreeing),
            seed=request.seed,
            k=request.k,
            steps=request.sampler.num_steps,
            guidance_scale=request.sampler.guidance_scale,
            sampler=request.sampler.order,
            model=self.model.name,
            seconds=round(time.monotonic() - started, 3),
            lead=request.lead,
            agreement=request.agreement,
            read=None if grids is None else int(grids.sum()),
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def images_at_once(device: torch.device, places: int) -> int:
    """Images of so many places drawn together; a number of its own for each device and model.

    Fixed, because a batched matrix product gives other last bits at another batch size; and no larger than what fills the device,
    because a single image is drawn as so many.
    """
    return max(1, PLACES_AT_ONCE.get(device.type, 1) // (2 * places))


def _row(condition: Condition, place: int, number: int, request: Request) -> Condition:
    """y of the image with this number, which stands at this place of those to be drawn."""
    row = condition if len(condition.y) == 1 else condition.select([place])
    return led_in_turn(row, number) if request.lead == "rotate" else row


def _deliverer(request: Request, output: Callable[[list[Image.Image]], Output]) -> Deliver:
    """Hand each image of a batch to the request's `on_image`, as an output of its own."""

    def deliver(first: int, images: Sequence[Image.Image]) -> None:
        if request.on_image is not None:
            for number, image in enumerate(images, first):
                request.on_image(number, output([image]))

    return deliver


def _watch(
    callback: Callback | None, numbers: Sequence[int], batch: list[int], micro_batch: int
) -> Callable[[StepInfo], None] | None:
    """Turn the sampler's callback for one batch into the request's, which counts over all images."""
    if callback is None:
        return None
    batches, before = -(-len(numbers) // micro_batch), batch[0] // micro_batch
    drawn = tuple(numbers[i] for i in batch)

    def tell(info: StepInfo) -> None:
        done, total = before * info.total + info.index, batches * info.total
        callback(Passed(done=done, total=total, numbers=drawn, info=info))

    return tell
