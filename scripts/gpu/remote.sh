#!/bin/bash
# What each call runs on the machine with the GPU, in the root of the checkout that travelled:
#   bash scripts/gpu/remote.sh recv N | smoke [SECONDS] [CHANGE ...] | train MINUTES [CHANGE ...] | eval [TEXTS QUESTIONS] | bench
# CHANGE is one of `gmsa train`, e.g. trainer.learning_rate=4e-4, or --resume. What is kept from call to call lies in $G,
# what is brought back in $OUT.
set -euo pipefail
G=${G:-/tmp/gmsa} PY=${PY:-python3}
mkdir -p "$G" && cd "$(dirname "$0")/../.."
export GMSA_HOME=$G/home PYTHONPATH=$PWD:$G/site:$G/load PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
export TORCHINDUCTOR_CACHE_DIR=$G/inductor TRITON_CACHE_DIR=$G/triton # what is compiled once serves the next call
recipe=$G/recipes/default-7-gpu.yaml

install() { # what the machine may lack
    $PY -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$G/site" .gpu/kit/*.whl
}
run_training() { # OUTPUT MINUTES CHANGE ...
    local start=(--overwrite)
    case " ${*:3} " in *" --resume "*) start=() ;; esac
    $PY -m gmsa train "${start[@]}" "$recipe" output="$1" max_minutes="$2" init="$G/load/model" "${@:3}"
}
shards() { # MODEL: into $OUT in four parts, each there whole or not at all
    rm -rf "$G/shards" && mkdir "$G/shards"
    split -n 4 -d -a 1 "$1/model.safetensors" "$G/shards/model." && cp "$1/config.json" "$G/shards/"
    [ "$(stat -c %s "$G/shards/model.0")" -le 12500000 ] || echo "NOTE: shards of more than 12.5 MB: $(du -b "$G/shards/model.0")"
    mv "$G"/shards/model.? "$OUT/" && mv "$G/shards/config.json" "$OUT/" # it has the hash of the whole
}
export_checkpoints() { # RUN: each that is complete, as the model it would be if training ended there
    local last= newest
    while sleep 3; do
        newest=$(ls -d "$1"/checkpoint-* 2>/dev/null | sort -t- -k2n | tail -n 1) || true
        [ -n "$newest" ] && [ "$newest" != "$last" ] && [ -f "$newest/manifest.json" ] || continue
        # Linked, since the run deletes old ones.
        rm -rf "$G/linked" && cp -rl "$newest" "$G/linked" || continue
        if CUDA_VISIBLE_DEVICES= nice $PY scripts/gpu/export.py "$G/linked" "$G/exported" >"$G/export.txt" 2>&1; then
            shards "$G/exported" && last=$newest && cp "$1/log.jsonl" "$OUT/" && echo "exported ${newest##*/}"
        else
            echo "not exported: $(tail -n 1 "$G/export.txt")"
        fi
    done
}

case $1 in
recv)
    cp ".gpu/$2/part.$2" "$G/"
    [ "$2" = 1 ] || exit 0
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader || true
    nproc; free -g | sed -n 2p; df -h /dev/shm "$G"; ulimit -n
    install
    $PY -c 'import torch, transformers, accelerate, tokenizers, safetensors, numpy, yaml, tqdm, requests, gguf, matplotlib, sacrebleu
from gmsa.sentences import bm25
bm25(["The mill is old.", "It rains."], "Which mill?")
print("torch", torch.__version__, "transformers", transformers.__version__, "GPU:", torch.cuda.is_available())'
    ;;
smoke)
    seconds=${2:-120}
    (cd "$G" && cat part.? >load.tar.xz && sha256sum -c --status "$OLDPWD/.gpu/kit/load.sha256" && rm -rf load && mkdir load &&
        tar -C load -xJf load.tar.xz) || { echo "FAILED: the pieces are not whole: send them again"; exit 1; }
    rm -rf "$G/recipes" && cp -r recipes "$G/"
    sed -E -i "s#\.\./shared/data/#$G/load/data/#; s#(_train(_2)?)\.jsonl\.gz#\1.jsonl#" "$recipe"
    $PY -c 'from gmsa.io.backbones import default_backbone_folder as folder; print("backbone:", folder())'
    ways=("" "compile=false" "packed=false compile=false")
    if ! $PY -m pytest -q tests/model/test_cuda.py -k "packed and written" >"$OUT/varlen.txt" 2>&1; then
        tail -n 15 "$OUT/varlen.txt"
        echo "VARLEN ATTENTION FAILS here; what avoids it: packed=false"
        ways=("packed=false compile=false")
    fi
    for way in "${ways[@]}"; do
        # shellcheck disable=SC2086 # a way is several words
        if run_training "$G/smoke" "$(awk "BEGIN {print $seconds / 60}")" $way trainer.logging_steps=5 trainer.save_steps=100000 \
            evaluate.every=100000 "${@:3}" 2>&1 | tee "$OUT/smoke.txt"; then
            echo "$way" >"$G/way" && cp "$G/smoke/log.jsonl" "$OUT/smoke.jsonl"
            echo "WORKS with: ${way:-the recipe as it is}"
            exec $PY scripts/gpu/speed.py "$G/smoke/log.jsonl"
        fi
        echo "FAILED with: ${way:-the recipe as it is} (above: why); what avoids it may be the next"
    done
    exit 1
    ;;
train)
    export_checkpoints "$G/run" & exporting=$!
    trap 'kill $exporting 2>/dev/null || true' EXIT
    # shellcheck disable=SC2046
    run_training "$G/run" "$2" $(cat "$G/way" 2>/dev/null || true) "${@:3}" 2>&1 | tee "$OUT/train.txt"
    kill $exporting && wait $exporting 2>/dev/null || true
    shards "$G/run/model" # the last word
    cp "$G/run/log.jsonl" "$OUT/" && $PY scripts/gpu/speed.py "$G/run/log.jsonl" && ls -l "$OUT"
    ;;
eval) $PY scripts/gpu/evaluate.py "$G/run/model" "$G/load/data" "$OUT/eval.json" "${@:2}" ;;
bench)
    install
    tokenizer=smollm2-135m-instruct # as call 4 has made it, or as packed for this call alone
    [ -d .gpu/kit/tokenizer ] && tokenizer=.gpu/kit/tokenizer
    $PY benchmarks/gpu.py --tokenizer "$tokenizer" --output "$OUT/gpu.json" "${@:2}" 2>&1 | tee "$OUT/gpu.txt"
    ;;
*) sed -n 2,6p "$0" >&2; exit 2 ;;
esac
