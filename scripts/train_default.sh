#!/bin/sh
# Trains the bundled default model from nothing, on CPU or GPU alike, and puts it into the package.
# It needs the files of docs/data.md in ../shared/data. Killed at any time, it goes on from the newest checkpoint when started again.
#   scripts/train_default.sh [key=value ...]     overrides for all recipes, e.g. tokens_per_batch=16384
set -eu
cd "$(dirname "$0")/.."
[ -n "${GMSA:-}" ] || make -s .venv/.installed-dev # GMSA, PYTHON: commands of an environment that is there
gmsa=${GMSA:-.venv/bin/gmsa} python=${PYTHON:-.venv/bin/python}
without_clock=""
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    without_clock="max_minutes=null trainer.max_steps=4800 trainer.dataloader_num_workers=0" # as many steps as on a GPU
if [ -n "$without_clock" ] &&
    ! { command -v g++ || command -v c++ || command -v clang++; } >/dev/null; then
    case " $* " in
    *" compile=false "*) ;;
    *) echo "error: stages 3 to 7 are compiled: install a C++ compiler (g++ or clang++), or add compile=false" >&2 && exit 2 ;;
    esac
fi
stages="1-restore 2-answer 3-continue 4-read 5-find 6-longer 7-gpu"
for stage in $stages; do
    if [ "$stage" = 6-longer ] && [ ! -e runs/default-mean/config.json ]; then
        # The mean of the last three is better than each of them: docs/training-log.md
        "$python" scripts/average_models.py runs/default-mean \
            runs/default-3-continue/model=0.2 runs/default-4-read/model=0.3 runs/default-5-find/model=0.5
    fi
    if [ ! -e "runs/default-$stage/model/config.json" ]; then
        changes=""
        [ "$stage" = 7-gpu ] && changes=$without_clock
        # shellcheck disable=SC2086 # changes are several words
        "$gmsa" train "recipes/default-$stage.yaml" --resume $changes "$@"
    fi
done
mkdir -p docs/training
for stage in $stages; do
    cp "runs/default-$stage/log.jsonl" "docs/training/default-$stage.jsonl"
    cp "runs/default-$stage/curve.png" "docs/training/default-$stage.png"
done
cp runs/default-7-gpu/model/* gmsa/models/default/
