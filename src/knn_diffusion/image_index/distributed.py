"""Embedding spread over processes or machines by Ray Data; what comes of it is saved by one writer, here.

Chunks of images go to a pool of workers. Each holds the encoder and runs `embedding.embed`. Outcomes come back in the order
of the images, so that the store gets the same rows as from one process. A chunk comes as a whole or not at all: when a
worker dies, Ray starts another, which does the chunk again; images that are the end of one worker after the other are
passed over with that reason.
"""

from __future__ import annotations

import collections
import os
import secrets
import socket
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from knn_diffusion.config import config, require
from knn_diffusion.errors import KnnDiffusionError, MissingDependencyError
from knn_diffusion.image_index.embedding import Group, Outcome, Skipped, embed
from knn_diffusion.image_index.ingest import COMMIT_IMAGES
from knn_diffusion.images import SourceImage
from knn_diffusion.models.encoders import JointEncoder
from knn_diffusion.retrieval.database import text
from knn_diffusion.retrieval.segments import Snapshot
from knn_diffusion.retrieval.store import Store
from knn_diffusion.tokens import Tokenize

CHUNKS_PER_WORKER = 4
"""At least so many where there are few images, so that no worker idles while another is at the last chunk."""
ATTEMPTS = 3
"""Workers that may die over one chunk."""
DEADLY = f"{ATTEMPTS} workers died over it or an image beside it: add it by itself to see why"
SETTLED_SECONDS = 600.0
"""A file that changed so shortly before its image was saved may have changed after it was read."""
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_LOG_LEVEL": "CRITICAL", "RAY_BACKEND_LOG_LEVEL": "fatal"}
"""No usage statistics are sent, and nothing is written between our own lines."""
ON_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""What keeps Ray from listening on other interfaces, on any system, whatever its name says."""
RAY_VARIABLES = ("RAY_", "PYTHONBREAKPOINT")
"""How those variables begin that Ray reads or sets."""
SHORT_PATH = "/tmp" if os.name == "posix" else None
"""Below it the names of sockets are short enough."""


@config
class RayConfig:
    """Where embedding is spread to.

    address           a running cluster, as Ray names it ("auto", "host:6379"); None starts Ray on this machine
    workers           processes that embed; None: one for each processor, or for each GPU when they take any
    gpus_per_worker   share of a GPU that each takes; 0 embeds on processors
    """

    address: str | None = None
    workers: int | None = None
    gpus_per_worker: float = 0.0

    def __post_init__(self) -> None:
        require(self.workers is None or self.workers >= 1, "workers", self.workers, "at least 1 or None")
        require(self.gpus_per_worker >= 0, "gpus_per_worker", self.gpus_per_worker, "at least 0")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Images for one worker, and the content digests that the store holds under their sources."""

    number: int
    images: Sequence[SourceImage]
    known: frozenset[str]
    tokenized: bool

    def is_known(self, source: SourceImage, content: str) -> str | None:
        """The digest, if it is one of those."""
        return content if content in self.known else None


class Attempts:
    """How often each chunk was begun; a process of its own, which outlives the workers."""

    def __init__(self) -> None:
        self.begun = collections.Counter[int]()

    def begin(self, chunk: int) -> int:
        """Count one more and return how many there were."""
        self.begun[chunk] += 1
        return self.begun[chunk]


class Worker:
    """A process of the pool, in the caller's folder if it can see that, so that relative paths mean the same."""

    def __init__(self, attempts: Any, shared: Sequence[Any], folder: str, side: int | None, on_gpu: bool) -> None:
        self.ray, self.attempts, self.side = _imported(), attempts, side
        self.encoder, self.tokenize = self.ray.get(shared[0])
        if on_gpu:
            self.encoder.to("cuda")
            if self.tokenize is not None:
                self.tokenize.to(torch.device("cuda"))
        with suppress(OSError):
            os.chdir(folder)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[list[Outcome] | KnnDiffusionError]]:
        """What becomes of the images of each chunk, or why the encoder fails."""
        return {"outcomes": [self._embed(chunk) for chunk in batch["chunk"]]}

    def _embed(self, chunk: Chunk) -> list[Outcome] | KnnDiffusionError:
        if self.ray.get(self.attempts.begin.remote(chunk.number)) > ATTEMPTS:
            return [Skipped(source=one.source, reason=DEADLY) for one in chunk.images]
        try:
            tokenize = self.tokenize if chunk.tokenized else None
            return list(embed(chunk.images, self.encoder, self.side, chunk.is_known, tokenize))
        except Exception as error:  # returned, as Ray would wrap it until nobody knows what it said
            return _failure(error)


def embed_on_ray(
    groups: Sequence[Group],
    encoder: JointEncoder,
    store: Store,
    side: int | None,
    settings: RayConfig,
    tokenize: Tokenize | None = None,
) -> Generator[Outcome, None, None]:
    """What becomes of each image, in order, but first of those that need not be read again.

    An image is passed over unread when the store has one of the same absolute path and the file has not changed since.
    That of a relative path, or of a file that changed lately, is read, and encoded only if it is another. With `tokenize`
    all are read. No worker gets images of two groups at once.

    Raises: MissingDependencyError without Ray; KnnDiffusionError when there is no cluster at the address, or workers
        cannot start or die again and again.
    """
    known = _known(store, [one for group in groups for one in group.images])

    def is_due(one: SourceImage) -> bool:
        return tokenize is not None or one.source not in known or not _is_settled(one.source, known[one.source][1])

    todo = [Group([one for one in group.images if is_due(one)], group.tokenized) for group in groups]
    count = sum(len(group.images) for group in todo)
    yield from [None] * (sum(len(group.images) for group in groups) - count)
    if not count:
        return
    with connected(settings) as ray:
        workers = settings.workers or _places(ray, settings)
        size = min(COMMIT_IMAGES, -(-count // (CHUNKS_PER_WORKER * workers)))
        contents = {source: content for source, (content, _) in known.items()}
        pieces = [
            Group(group.images[start : start + size], group.tokenized)
            for group in todo
            for start in range(0, len(group.images), size)
        ]
        chunks = [_chunk(number, piece, contents) for number, piece in enumerate(pieces)]
        yield from _spread(ray, chunks, (encoder, tokenize), side, workers, settings.gpus_per_worker)


def _chunk(number: int, group: Group, contents: Mapping[str, str]) -> Chunk:
    known = frozenset(contents[one.source] for one in group.images if one.source in contents)
    return Chunk(number, group.images, known, group.tokenized)


@contextmanager
def connected(settings: RayConfig) -> Iterator[Any]:
    """Ray, connected as it is already or as the settings say; what is started and set here ends here.

    Raises: MissingDependencyError without Ray; KnnDiffusionError when there is no cluster at the address.
    """
    with _variables(QUIET if settings.address else QUIET | ON_LOOPBACK):
        ray = _imported()
        if ray.is_initialized():
            yield ray
            return
        if settings.address is not None:
            _require_answer(settings.address)
        with TemporaryDirectory(prefix="ray-", dir=SHORT_PATH, ignore_cleanup_errors=True) as folder:
            _start(ray, settings.address, folder)
            try:
                yield ray
            finally:
                ray.shutdown()


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables that are not set, and in the end take back all that were set for Ray meanwhile, by itself too."""
    before = _of_ray(os.environ)
    os.environ.update({**values, **before})
    try:
        yield
    finally:
        for name in _of_ray(os.environ).keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)
        _forget_variables()


def _of_ray(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name.startswith(RAY_VARIABLES)}


def _forget_variables() -> None:
    """Make Ray read its variables when it starts the next time: it remembers mode and token of the first."""
    ray: Any = sys.modules.get("ray")
    if ray is not None and not ray.is_initialized():
        with suppress(AttributeError):  # a version without tokens
            ray._raylet.AuthenticationTokenLoader.instance().reset_cache()
            ray._raylet.Config.initialize("")


def _start(ray: Any, address: str | None, folder: str) -> None:
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    ray._private.worker._worker_logs_enabled = False  # else it tells of each dead worker on standard output
    try:
        with _unsaid():
            if address is None:
                os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray puts one into the home folder
                ray.init("local", include_dashboard=False, _temp_dir=folder, **quiet)
            else:
                ray.init(address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        if address is None:
            raise KnnDiffusionError(
                f"expected Ray to start on this machine, it did not ({_reason(error)}): see that memory and disk are free"
            ) from None
        raise KnnDiffusionError(
            f"expected a Ray cluster at {address}, none could be joined ({_reason(error)}): give the host:port of a cluster with "
            "the same Ray and Python, or no address to work on this machine"
        ) from None


def _require_answer(address: str) -> None:
    """Raise KnnDiffusionError at once when nobody listens at a plain address; Ray itself tries for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal() or "//" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise KnnDiffusionError(
            f"expected a Ray cluster at {address}, nobody answers there ({_reason(error)}): check the address, or give none "
            "to work on this machine"
        ) from None


@contextmanager
def _unsaid() -> Iterator[None]:
    """Drop what Ray's own code writes to standard error on starting: that it is told to be quiet."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _imported() -> Any:
    try:
        import ray
        import ray.data
    except ImportError:
        raise MissingDependencyError(
            "expected Ray to spread the work, it is not installed: pip install 'knn-diffusion[ray]'"
        ) from None
    return ray


def _places(ray: Any, settings: RayConfig) -> int:
    """How many workers Ray has room for. Raises: KnnDiffusionError when there is no GPU for one that takes any."""
    there, share = ray.cluster_resources(), settings.gpus_per_worker
    fitting = int(there.get("GPU", 0.0) / share if share else there.get("CPU", 0.0))
    if share and not fitting:
        raise KnnDiffusionError(
            f"expected {share:g} of a GPU for each worker, Ray has {there.get('GPU', 0.0):g} GPUs: ask for less, or 0 to embed "
            "on processors"
        )
    return max(1, fitting)


def _spread(
    ray: Any,
    chunks: Sequence[Chunk],
    networks: tuple[JointEncoder, Tokenize | None],
    side: int | None,
    workers: int,
    gpus: float,
) -> Iterator[Outcome]:
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    shared = [ray.put(networks)]  # in a list each worker fetches them, and they outlive those that die
    attempts = ray.remote(num_cpus=0)(Attempts).remote()
    with ray.data.DataContext.current(context):
        outcomes = ray.data.from_items([{"chunk": one} for one in chunks], override_num_blocks=len(chunks)).map_batches(
            Worker,
            fn_constructor_args=(attempts, shared, os.getcwd(), side, gpus > 0),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(chunks))),
            num_cpus=1,
            num_gpus=gpus,
        )
        try:
            for batch in outcomes.iter_batches(batch_size=None, prefetch_batches=0):
                for of_chunk in batch["outcomes"]:
                    if isinstance(of_chunk, KnnDiffusionError):
                        raise of_chunk
                    yield from of_chunk
        except ray.exceptions.RayError as error:
            raise _failure(error) from None


def _known(store: Store, found: Sequence[SourceImage]) -> dict[str, tuple[str, float]]:
    """Content digest and time of saving of each image that the store has under the source of one of these."""
    wanted = {text(one.source): one.source for one in found}

    def read(now: Snapshot) -> dict[str, tuple[str, float]]:
        facts = store.facts(store.rows_from(list(wanted), now), now)
        return {wanted[source]: (content.hex(), added_at) for _, source, _, content, added_at in facts}

    return store.consistently(read)


def _is_settled(source: str, saved_at: float) -> bool:
    """Whether it is an absolute path of a file that was neither written nor moved there after its image was saved."""
    path = Path(source.partition("::")[0])
    try:
        changed_at = max(path.stat().st_mtime, path.stat().st_ctime)
    except OSError:
        return False
    return path.is_absolute() and changed_at + SETTLED_SECONDS < saved_at


def _failure(error: BaseException) -> KnnDiffusionError:
    return KnnDiffusionError(
        f"expected workers that embed, one failed ({_reason(error)}): see that they have what the encoder needs, then give the "
        "same command again; what was added is kept"
    )


def _reason(error: BaseException) -> str:
    """The last line, where Ray tells what happened in a worker."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:200]
