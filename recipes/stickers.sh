#!/usr/bin/env bash
# The bundled model from nothing, with one command:
#
#     recipes/stickers.sh cpu [MINUTES]     two cores, about two and a half hours
#     recipes/stickers.sh gpu [MINUTES]     one GPU
#
# Every training stage stops after MINUTES (default: never) and goes on when the same command is run again, so the recipe
# runs in slices. It needs the emoji font (fonts-noto-color-emoji) and no network. Everything lands in recipes/runs/, where
# backbone/ must lie already (recipes/backbone.py).
set -euo pipefail
cd "$(dirname "$0")/.."
hardware=${1:?say cpu or gpu}
slice=${2:+--max-minutes $2}
runs=recipes/runs/$hardware
python=${PYTHON:-.venv/bin/python}
knn="$python -m knn_diffusion"
preset=stickers-$hardware
scenes=$([ "$hardware" = gpu ] && echo 60000 || echo 40000)
mkdir -p "$runs"

# Later stages stand on finished earlier ones: a slice that ran out ends the script here.
train() {
    $knn train "$@" --resume $slice --json | tee "$runs/slice.json"
    grep -q '"finished": true' "$runs/slice.json" || { echo "the time is up: run the same command again to go on" >&2; exit 0; }
}

# 1. Pictures: random scenes to learn from, and one-object pictures for the bundled index. Held-out concepts are in neither.
$knn dataset stickers "$runs/scenes" --count "$scenes" --seed 1 --split train
if [ ! -f "$runs/pictures.done" ]; then
    $python recipes/sticker_pictures.py "$runs/pictures"
    touch "$runs/pictures.done"
fi

# 2. The joint encoder plays CLIP's part: it reads captions and knows every concept. The generator sees neither.
$knn dataset stickers "$runs/captioned" --count "$scenes" --seed 2 --split all
train encoder --preset stickers --images "$runs/captioned" --set backbone="$runs/backbone" --output "$runs/encoder"

# 3. Tokenizer, index and denoiser learn from pixels only.
train tokenizer --preset "$preset" --images "$runs/scenes" --output "$runs/tokenizer"
if [ ! -f "$runs/index.done" ]; then
    rm -rf "$runs/index"  # begun and not finished
    $knn index build "$runs/scenes" --encoder "$runs/encoder/model" --output "$runs/index"
    touch "$runs/index.done"
fi
train denoiser --preset "$preset" --images "$runs/scenes" --index "$runs/index" \
    --tokenizer "$runs/tokenizer/model" --output "$runs/denoiser"

# 4. The bundle: the model with the small index of one-object pictures inside.
$python recipes/bundle.py "$runs" src/knn_diffusion/bundles/stickers
