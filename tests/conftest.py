"""Shape checks are on in the tests: every jaxtyped signature of the package is checked by beartype."""

from jaxtyping import install_import_hook

install_import_hook("knn_diffusion", "beartype.beartype").__enter__()
