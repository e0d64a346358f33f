#!/bin/sh
# Trains the bundled default model from nothing, on CPU or GPU alike, and puts it into the package.
# Killed at any time, it goes on from the newest checkpoint when started again.
#   scripts/train_default.sh [key=value ...]     overrides for all four recipes, e.g. tokens_per_batch=16384
set -eu
cd "$(dirname "$0")/.."
[ -n "${GMSA:-}" ] || make -s .venv/.installed-dev # GMSA: the gmsa command of an environment that is there already
gmsa=${GMSA:-.venv/bin/gmsa}
stages="1-restore 2-answer 3-continue 4-read"
for stage in $stages; do
    if [ ! -e "runs/default-$stage/model/config.json" ]; then
        "$gmsa" train "recipes/default-$stage.yaml" --resume "$@"
    fi
done
mkdir -p gmsa/models/default docs/training
cp runs/default-4-read/model/* gmsa/models/default/
for stage in $stages; do
    cp "runs/default-$stage/log.jsonl" "docs/training/default-$stage.jsonl"
    cp "runs/default-$stage/curve.png" "docs/training/default-$stage.png"
done
