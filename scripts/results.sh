#!/bin/sh
# Makes the numbers of the shipped model in docs/results.md, the README and the model card anew: two days on two CPU cores.
# Goes on where it stopped: answers are cached in the output folder.
#   scripts/results.sh DATA OUT [TEXT_DECODER]      DATA: docs/data.md; TEXT_DECODER: trained by recipes/text-decoder.yaml
set -eu
cd "$(dirname "$0")/.."
data=$1 out=$2 text_decoder=${3:-runs/text-decoder/model}
gmsa=${GMSA:-gmsa} python=${PYTHON:-python}
mkdir -p "$out"

# Restoration
texts=$data/text_dev.jsonl.gz
"$gmsa" eval restoration --data "$texts" --lengths 128 --merge-size 4,8,2 --limit 500 -o "$out/restoration-128"
"$gmsa" eval restoration --data "$texts" --lengths 128 --merge-size 1,16,32 --limit 100 -o "$out/restoration-rates"
"$gmsa" eval restoration --data "$texts" --lengths 16,32,64 --merge-size 2,4,8 --limit 200 -o "$out/restoration-short"
"$gmsa" eval restoration --data "$texts" --lengths 128 --merge-size 4 --limit 64 --check -o "$out/restoration-checked"
"$gmsa" eval restoration --data "$texts" --methods gmsa-refined --lengths 128 --merge-size 4 --limit 32 --bertscore none -o "$out/restoration-refined"
"$gmsa" eval restoration --data "$texts" --methods gmsa-refined --lengths 128 --merge-size 8 --limit 16 --bertscore none -o "$out/restoration-refined-8x"
"$python" scripts/join_texts.py "$texts" 2800 >"$out/text_dev_long.jsonl"
"$gmsa" eval restoration --data "$out/text_dev_long.jsonl" --lengths 512 --merge-size 4 --limit 325 -o "$out/restoration-512"

# Answers: 500 questions of each file
for set in squad nq hotpotqa 2wiki; do
    "$gmsa" eval qa --data "$data/qa_dev_$set.jsonl.gz" --text-decoder "$text_decoder" \
        --methods gmsa,original-prompt,original-prompt-trained,closed-book-trained --merge-size 4,8,2 --limit 500 -o "$out/qa-$set-500"
done

"$gmsa" eval qa --data "$data/qa_dev_squad.jsonl.gz" --methods gmsa,gmsa-refined --merge-size 4 --limit 100 -o "$out/qa-squad-refined"

# Beside other methods: 100 questions of each file
bounds="gmsa,original-prompt,original-prompt-trained,closed-book-trained"
cut="truncate-head-trained,bm25-sentences-trained,embedding-sentences-trained,llmlingua-trained"
for set in squad nq; do
    "$gmsa" eval qa --data "$data/qa_dev_$set.jsonl.gz" --text-decoder "$text_decoder" --merge-size 4,8 --limit 100 \
        --methods "$bounds,$cut,closed-book,bm25-sentences,llmlingua,snapkv,streaming-llm" -o "$out/qa-$set"
done
for set in hotpotqa 2wiki; do
    "$gmsa" eval qa --data "$data/qa_dev_$set.jsonl.gz" --text-decoder "$text_decoder" --merge-size 4,8 --limit 100 \
        --methods "$bounds,bm25-sentences-trained" -o "$out/qa-$set"
done
"$gmsa" eval qa --data "$data/qa_dev_narrativeqa.jsonl.gz" --text-decoder "$text_decoder" --merge-size 4,8 --limit 100 \
    --methods "$bounds,$cut" -o "$out/qa-narrativeqa"

# Beside the methods GMSA is named with: 200 questions of each file, all read by the shipped model's own decoder
own="gmsa,gmsa-hybrid,bm25-sentences-trained,embedding-sentences-trained,semantic-compression-trained,semantic-summary-trained"
caches="snapkv-trained,kvzip-trained,semanticache-trained"
for set in qa_dev_squad qa_dev_nq qa_dev_hotpotqa qa_dev_2wiki qa_dev_narrativeqa long_dev_fairytaleqa long_dev_squad_article \
    long_dev_nq_multidoc; do
    "$gmsa" eval qa --data "$data/$set.jsonl.gz" --text-decoder default --merge-size 4,8 --limit 200 \
        --methods "$own,$caches,open-provence-trained,original-prompt-trained" -o "$out/beside-${set#qa_dev_}"
done
"$gmsa" eval ruler --text-decoder default --lengths 1024,4096,16384 --merge-size 4,8 --limit 20 \
    --methods "gmsa,gmsa-hybrid,bm25-sentences-trained,original-prompt-trained" -o "$out/ruler"

# Many passages, long contexts, and summaries
"$gmsa" eval qa --data "$data/long_dev_nq_multidoc.jsonl.gz" --methods gmsa --merge-size 8 --limit 50 -o "$out/long-nq_multidoc"
short=closed-book-trained,truncate-head-trained,bm25-sentences-trained
"$gmsa" eval qa --data "$data/long_dev_fairytaleqa.jsonl.gz" --text-decoder "$text_decoder" --merge-size 8 --limit 50 \
    --methods "gmsa,original-prompt,$short" -o "$out/long-fairytaleqa"
"$gmsa" eval qa --data "$data/long_dev_squad_article.jsonl.gz" --text-decoder "$text_decoder" --merge-size 8 --limit 50 \
    --methods "gmsa,$short" -o "$out/long-squad_article" # some articles are too long for the original prompt
"$gmsa" eval summ --data "$data/summ_dev.jsonl.gz" --methods gmsa,original-prompt,truncate-head,bm25-sentences \
    --merge-size 4,8 --limit 60 --max-new-tokens 64 -o "$out/summ"

# Speed, and what storing differences in 8 bits costs (the second stage's last checkpoint is kept by a run of its recipe)
"$python" benchmarks/answering.py --output "$out/answering.json" --image "$out/answering.png"
if [ -d runs/default-2-answer/checkpoint-620 ]; then
    "$python" experiments/storage_form.py runs/default-2-answer/checkpoint-620 "$texts"
fi

# The ablations train their arms: an hour more on one core
"$python" experiments/ablations.py --data "$data/qa_dev_squad.jsonl.gz" --texts "$texts" --folder "$out/ablations" -o "$out/ablations.json"
"$gmsa" eval attention --data "$texts" --model "$out/ablations/full/restore/model" \
    --methods "gmsa,appended=$out/ablations/appended/restore/model" --limit 10 -o "$out/attention"
"$gmsa" eval report "$out"/restoration-* "$out"/qa-* "$out"/beside-* "$out"/ruler "$out"/long-* "$out/summ" -o "$out/report"
