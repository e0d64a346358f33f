#!/bin/sh
# Trains the bundled default model from nothing, on CPU or GPU alike, and puts it into the package.
# Killed at any time, it goes on from the newest checkpoint when started again.
#   scripts/train_default.sh [key=value ...]     overrides for both recipes, e.g. tokens_per_batch=16384
set -eu
cd "$(dirname "$0")/.."
[ -n "${GMSA:-}" ] || make -s .venv/.installed-dev # GMSA: the gmsa command of an environment that is there already
gmsa=${GMSA:-.venv/bin/gmsa}
if [ ! -e runs/default-1-restore/model/config.json ]; then
    "$gmsa" train recipes/default-1-restore.yaml --resume "$@"
fi
"$gmsa" train recipes/default-2-answer.yaml --resume "$@"
mkdir -p gmsa/models/default docs/training
cp runs/default-2-answer/model/* gmsa/models/default/
for stage in 1-restore 2-answer; do
    cp "runs/default-$stage/log.jsonl" "docs/training/default-$stage.jsonl"
    cp "runs/default-$stage/curve.png" "docs/training/default-$stage.png"
done
