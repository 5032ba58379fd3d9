"""Shape checks are on in the tests: every jaxtyped signature of the package is checked by beartype. The network is off."""

import os

import torch
from jaxtyping import install_import_hook

install_import_hook("knn_diffusion", "beartype.beartype").__enter__()
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
os.environ["HF_HUB_OFFLINE"] = "1"  # read when the library is imported; tiny_hub lifts it for its own
