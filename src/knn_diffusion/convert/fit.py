"""Whether the tensors of a checkpoint are those of a network: names, shapes, finite values. Errors speak the file's names."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from knn_diffusion.errors import CheckpointError

SHOWN = 3
"""Names that an error lists."""


def some(names: Sequence[str]) -> str:
    """The first names of a list."""
    return ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "") or "none"


def check_names(
    what: str, expected: Collection[str], tensors: Collection[str], spelled: Mapping[str, str], cure: str
) -> None:
    """Raise a CheckpointError when tensors are missing, by our name where the file has none, or unexpected."""
    missing = [spelled.get(name, name) for name in expected if name not in tensors]
    extra = [spelled[name] for name in tensors if name not in expected]
    if missing or extra:
        raise CheckpointError(
            f"expected {what}, got {len(missing)} tensors too few ({some(missing)}) and {len(extra)} too many "
            f"({some(extra)}): {cure}"
        )


def check_values(
    shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], spelled: Mapping[str, str]
) -> None:
    """Raise a CheckpointError naming the first tensor of another shape, or those with NaN or infinity."""
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"expected {spelled[name]} of shape {list(shape)}, got {list(tensors[name].shape)}: "
                "the checkpoint is of another network or put together from several"
            )
    broken = [spelled[name] for name, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"expected finite weights, got NaN or infinity in {len(broken)} tensors ({some(broken)}): "
            "download the checkpoint again or take one from before its training failed"
        )
