#!/bin/sh
# Makes every number of docs/results.md, the README and the model card anew: some hours on two CPU cores.
# Goes on where it stopped: answers are cached in the output folder.
#   scripts/results.sh DATA OUT [TEXT_DECODER]      TEXT_DECODER: folder of the model trained by recipes/text-decoder.yaml
set -eu
cd "$(dirname "$0")/.."
data=$1 out=$2 text_decoder=${3:-runs/text-decoder/model}
gmsa=${GMSA:-gmsa} python=${PYTHON:-python}
mkdir -p "$out"

"$python" scripts/join_texts.py "$data/text_dev.jsonl.gz" 2800 >"$out/text_dev_long.jsonl"
"$gmsa" eval restoration --data "$data/text_dev.jsonl.gz" --lengths 128 --merge-size 1,2,4,8,16,32 --limit 500 -o "$out/restoration-128"
"$gmsa" eval restoration --data "$data/text_dev.jsonl.gz" --lengths 128 --merge-size 4 --limit 64 --check -o "$out/restoration-checked"
"$gmsa" eval restoration --data "$out/text_dev_long.jsonl" --lengths 256,512 --merge-size 2,4,8 --limit 200 -o "$out/restoration-long"

common="gmsa,original-prompt,original-prompt-trained,closed-book,closed-book-trained"
cut="truncate-head,truncate-middle-trained,truncate-head-trained,bm25-sentences,bm25-sentences-trained"
others="embedding-sentences-trained,llmlingua,llmlingua-trained,longllmlingua-trained,snapkv,streaming-llm"
for set in squad nq hotpotqa 2wiki; do
    "$gmsa" eval qa --data "$data/qa_dev_$set.jsonl.gz" --methods gmsa,original-prompt,original-prompt-trained \
        --text-decoder "$text_decoder" --merge-size 4,8 --limit 500 -o "$out/qa-$set-500"
done
for set in squad nq hotpotqa 2wiki narrativeqa; do
    "$gmsa" eval qa --data "$data/qa_dev_$set.jsonl.gz" --methods "$common,$cut,$others" --text-decoder "$text_decoder" \
        --merge-size 4,8 --limit 100 -o "$out/qa-$set"
done
"$gmsa" eval summ --data "$data/summ_dev.jsonl.gz" --methods "gmsa,original-prompt,truncate-head,bm25-sentences" \
    --merge-size 4,8 --limit 60 --max-new-tokens 64 -o "$out/summ"
"$gmsa" eval latency --lengths 512,2048,4096 --merge-size 4,8,16,32 --new-tokens 1,100 -o "$out/latency"
"$python" benchmarks/ablations.py --data "$data/qa_dev_squad.jsonl.gz" --texts "$data/text_dev.jsonl.gz" --folder "$out/ablations" \
    -o "$out/ablations.json" # trains its arms: an hour more on one core
"$gmsa" eval attention --data "$data/text_dev.jsonl.gz" --model "$out/ablations/full/restore/model" \
    --methods "gmsa,appended=$out/ablations/appended/restore/model" --limit 10 -o "$out/attention"
"$gmsa" eval report "$out"/restoration-* "$out"/qa-* "$out/summ" "$out/latency" -o "$out/report"
