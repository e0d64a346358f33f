#!/bin/sh
# Makes the numbers of the shipped model in docs/results.md, the README and the model card anew: some hours on two CPU cores.
# Goes on where it stopped: answers are cached in the output folder.
#   scripts/results.sh DATA OUT      DATA: docs/data.md
set -eu
cd "$(dirname "$0")/.."
data=$1 out=$2
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

# Answers. One decoder, the shipped one, reads soft tokens and text alike (-trained)
data_of() { echo "$data/$1.jsonl.gz"; }
all="gmsa,gmsa-chosen-sentences,gmsa-bm25-sentences,gmsa-embedding-sentences,gmsa-hybrid"
all="$all,chosen-sentences-trained,bm25-sentences-trained,embedding-sentences-trained,original-prompt-trained,closed-book-trained"
others=semantic-compression-trained,semantic-summary-trained,snapkv-trained,kvzip-trained,semanticache-trained
for set in squad nq; do
    "$gmsa" eval qa --data "$(data_of qa_dev_$set)" --text-decoder default --merge-size 4,8 --limit 500 --methods "$all" -o "$out/qa-$set"
    "$gmsa" eval qa --data "$(data_of qa_dev_$set)" --merge-size 1,2,16 --limit 500 --methods gmsa -o "$out/qa-$set-rates"
done
for set in hotpotqa 2wiki narrativeqa; do
    "$gmsa" eval qa --data "$(data_of qa_dev_$set)" --text-decoder default --merge-size 4,8 --limit 200 --methods "$all" -o "$out/qa-$set"
done
for set in squad nq hotpotqa 2wiki narrativeqa; do
    "$gmsa" eval qa --data "$(data_of qa_dev_$set)" --text-decoder default --merge-size 4,8 --limit 200 -o "$out/others-$set" \
        --methods "$others,llmlingua-trained"
done

# Long contexts, RULER's tasks, and summaries
long="gmsa,gmsa-chosen-sentences,gmsa-bm25-sentences,gmsa-hybrid,chosen-sentences-trained,bm25-sentences-trained"
long="$long,embedding-sentences-trained,original-prompt-trained,closed-book-trained"
for set in nq_multidoc fairytaleqa squad_article; do
    "$gmsa" eval qa --data "$(data_of long_dev_$set)" --text-decoder default --merge-size 8,4 --limit 200 --methods "$long" -o "$out/long-$set"
    "$gmsa" eval qa --data "$(data_of long_dev_$set)" --text-decoder default --merge-size 8,4 --limit 200 --methods "$others" -o "$out/others-long-$set"
done
"$gmsa" eval ruler --text-decoder default --lengths 1024,4096,16384 --merge-size 4 --limit 10 --methods gmsa,gmsa-chosen-sentences,gmsa-bm25-sentences,bm25-sentences-trained \
    --max-new-tokens 64 -o "$out/ruler"
"$gmsa" eval summ --data "$(data_of summ_dev)" --methods gmsa,original-prompt,truncate-head,bm25-sentences \
    --merge-size 4,8 --limit 60 --max-new-tokens 64 -o "$out/summ"

# Speed
"$python" benchmarks/answering.py --output "$out/answering.json" --image "$out/answering.png"

# The ablations train their arms: an hour more on one core
"$python" experiments/ablations.py --data "$data/qa_dev_squad.jsonl.gz" --texts "$texts" --folder "$out/ablations" -o "$out/ablations.json"
"$gmsa" eval attention --data "$texts" --model "$out/ablations/full/restore/model" \
    --methods "gmsa,appended=$out/ablations/appended/restore/model" --limit 10 -o "$out/attention"
"$gmsa" eval report "$out"/restoration-* "$out"/qa-* "$out"/others-* "$out"/ruler "$out"/long-* "$out/summ" -o "$out/report"
