"""Shape checks are on in the tests: every jaxtyped signature of the package is checked by beartype."""

import torch
from jaxtyping import install_import_hook

install_import_hook("knn_diffusion", "beartype.beartype").__enter__()
torch.set_num_threads(1)  # tiny tensors: more threads only wait for each other
