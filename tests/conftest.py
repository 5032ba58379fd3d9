"""Shape checks are on in the tests: every jaxtyped signature of the package is checked by beartype. The network is off."""

import os
from collections.abc import Iterator

import jaxtyping
import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

settings.register_profile("the same every time", derandomize=True)
settings.load_profile("the same every time")
install_import_hook("knn_diffusion", "beartype.beartype").__enter__()
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported; tiny_hub lifts it for its own


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Without the checks, which cannot be part of a compiled graph; what was compiled is forgotten."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    torch.compiler.reset()
