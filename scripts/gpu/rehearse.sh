#!/bin/bash
# The whole procedure on this machine, with a folder in place of the one with the GPU, on the real files, a few tiny steps:
#   scripts/gpu/rehearse.sh DATA GGUF [FOLDER]      FOLDER: runs/rehearse-gpu-calls; PY: a Python with the package's needs
# Each call sends what a call to the other machine would send (tracked files, untracked ones that git does not ignore, and
# the ignored folders named), checks the 64 MiB and runs the same command. SKIP_PACK=1 takes the pieces that are there.
set -euo pipefail
cd "$(dirname "$0")/../.."
data=$1 gguf=$2 root=$PWD sim=$(realpath -m "${3:-runs/rehearse-gpu-calls}")
PY=$(realpath -s "${PY:-.venv/bin/python}")
rm -rf "$sim" && mkdir -p "$sim/tree"
trap 'sh scripts/gpu/pack.sh restore >/dev/null' EXIT
[ -n "${SKIP_PACK:-}" ] || PYTHON=$PY sh scripts/gpu/pack.sh "$data" "$gguf"
: >gmsa/models/default/model.safetensors

call() { # FOLDER ... -- COMMAND
    local carry=() bytes began=$SECONDS
    while [ "$1" != -- ]; do carry+=("$1"); shift; done
    shift
    { git ls-files -z -c -o --exclude-standard; find "${carry[@]}" -type f -print0; } >"$sim/list"
    bytes=$(xargs -0 du -cb <"$sim/list" | tail -n 1 | cut -f 1)
    echo "== $*  | travels: $(awk "BEGIN {printf \"%.1f\", $bytes / 1048576}") MiB"
    [ "$bytes" -le 67108864 ] || { echo "more than 64 MiB"; exit 1; }
    tar -cf - --null -T "$sim/list" | tar -C "$sim/tree" -xf -
    rm -rf "$sim/OUT" && mkdir "$sim/OUT"
    (cd "$sim/tree" && OUT=$sim/OUT G=$sim/gmsa PY=$PY "$@") || { echo "failed"; exit 1; }
    echo "   $((SECONDS - began)) s; back: $(cd "$sim/OUT" && find . -type f -printf '%f %s; ')"
    [ "$(find "$sim/OUT" -type f | wc -l)" -le 8 ] && [ -z "$(find "$sim/OUT" -size +16M)" ] || { echo "too much came back"; exit 1; }
}

tiny=(tokens_per_batch=256 max_context=256 compile=false evaluate.texts=2 "evaluate.merge_sizes=[4]" trainer.dataloader_num_workers=2
    trainer.logging_steps=1 trainer.warmup_steps=1)
R="bash scripts/gpu/remote.sh"
pieces=$(ls .gpu | grep -x '[0-9]') last=$(ls .gpu | grep -x '[0-9]' | tail -n 1)
for piece in $pieces; do
    [ "$piece" = "$last" ] || call .gpu/kit ".gpu/$piece" -- $R recv "$piece"
done
call .gpu/kit ".gpu/$last" -- bash -c "$R recv $last && $R smoke 600 ${tiny[*]} trainer.max_steps=2"
restore() { # FOLDER: a sentence by the model that came back
    cat "$1"/model.[0-3] >"$1/model.safetensors"
    GMSA_HOME=$sim/gmsa/home PYTHONPATH=$root $PY -c "
from gmsa import GMSA
model = GMSA.from_pretrained('$1')
print('brought back:', model.restore(model.compress('The treaty was signed in Vienna in 1815 by eight powers.', 4)))"
}
killed="$R train 30 ${tiny[*]} trainer.max_steps=1000 trainer.save_steps=8"
call .gpu/kit -- bash -c "setsid $killed & until [ -f \$OUT/config.json ]; do sleep 1; kill -0 \$! || exit; done; kill -KILL -- -\$!"
cp -r "$sim/OUT" "$sim/killed"
call .gpu/kit -- $R train 10 "${tiny[@]}" trainer.max_steps=4 trainer.save_steps=2
cp -r "$sim/OUT" "$sim/back"
call .gpu/kit -- $R eval 2 2
restore "$sim/killed"
restore "$sim/back"
