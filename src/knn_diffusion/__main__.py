"""`python -m knn_diffusion` is the command line."""

from __future__ import annotations

import sys

from knn_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main())
