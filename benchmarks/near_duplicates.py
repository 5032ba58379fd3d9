"""Claim: joined cells find more than 99 % of the planted near-copies of an index, and leave what repeats nothing.

    python benchmarks/near_duplicates.py [--size 200000] [--threshold 0.95] [--json]

The vectors are CLIP-like, with a near-copy (cosine .93 to .995) in every twenty; see vector_search/clip_like.py. They have no
pictures, so that the embeddings alone decide. A copy is found when it and its original do not both stay. Beside, every
image is held against all that stay, for a sample of those: what still repeats another was missed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float32, Int
from vector_search.clip_like import BLOCK_ROWS, ClipLike
from vector_search.report import machine

from knn_diffusion.retrieval.near_duplicates import NearDuplicateRule, find_near_duplicates
from knn_diffusion.retrieval.store import EncoderIdentity, Item, Store

SAMPLE, SEED = 4_000, 1


def filled(world: ClipLike, size: int) -> Store:
    """A store in memory of the first `size` images of the world."""
    store = Store.create(None, EncoderIdentity(name="clip-like", fingerprint="0" * 16, dim=world.dim))
    for start in range(0, size, BLOCK_ROWS):
        vectors = world.block(start // BLOCK_ROWS, SEED)[: size - start]
        contents = [hashlib.sha256(str(start + number).encode()).hexdigest() for number in range(len(vectors))]
        store.append([Item(source="", content=content) for content in contents], vectors)
    return store


def planted(world: ClipLike, size: int, threshold: float) -> Iterator[tuple[int, int]]:
    """Rows of each planted copy that is near enough, and of its original."""
    for start in range(0, size, BLOCK_ROWS):
        number = start // BLOCK_ROWS
        plain, block = world.block(number, SEED, copies=False), world.block(number, SEED)[: size - start]
        copies = np.flatnonzero((plain[: len(block)] != block).any(1))
        cosines = block[copies] @ block.T
        cosines[np.arange(len(copies)), copies] = -1
        originals, near = cosines.argmax(1), cosines.max(1) >= threshold
        yield from zip((start + copies[near]).tolist(), (start + originals[near]).tolist(), strict=True)


def missed(store: Store, stays: Int[np.ndarray, "stays"], threshold: float) -> float:
    """Of a sample of those that stay, the share that another one that stays repeats."""
    vectors = store.embeddings(stays).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    sample = np.random.default_rng(0).choice(len(stays), min(SAMPLE, len(stays)), replace=False)
    near = sum(
        _near(vectors[sample], vectors[start : start + BLOCK_ROWS], threshold)
        for start in range(0, len(stays), BLOCK_ROWS)
    )
    return float((near > 1).mean())


def peak_memory_mib(*, forget: bool = False) -> int:
    """The most this process held since it was last asked to forget; Linux only."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    if forget:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) // 1024


def _near(
    one: Float32[np.ndarray, "sample dim"], other: Float32[np.ndarray, "rows dim"], threshold: float
) -> Int[np.ndarray, "sample"]:
    return (one @ other.T >= threshold).sum(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=200_000)
    parser.add_argument("--threshold", type=float, default=0.95)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    world = ClipLike()
    with filled(world, options.size) as store:
        peak_memory_mib(forget=True)
        before, began = peak_memory_mib(), time.process_time()
        found = find_near_duplicates(store, store.snapshot(), NearDuplicateRule(threshold=options.threshold))
        seconds, after = time.process_time() - began, peak_memory_mib()
        stays: Bool[np.ndarray, "rows"] = np.ones(options.size, bool)
        stays[found.dropped] = False
        known = [
            not (stays[copy] and stays[original]) for copy, original in planted(world, options.size, options.threshold)
        ]
        result = {
            "images": options.size,
            "threshold": options.threshold,
            "every_pair": found.exact,
            "cpu_seconds": round(seconds, 1),
            "dropped": len(found.dropped) / options.size,
            "planted_found": float(np.mean(known)),
            "staying_that_repeat_another": missed(store, np.flatnonzero(stays), options.threshold),
            "more_peak_memory_mib": after - before,
        }
    report = {**result, "machine": machine()}
    print(json.dumps(report) if options.json else "\n".join(f"{name}: {value}" for name, value in report.items()))


if __name__ == "__main__":
    main()
