#!/bin/sh
# Uses an installed gmsa as a user would, from an empty folder; the argument is the bin folder it is installed in.
set -eu
bin=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
GMSA_HOME=$work/home
export GMSA_HOME
cd "$work"
"$bin/gmsa" --version
"$bin/gmsa" info --json
"$bin/gmsa" pull
echo "The bridge over the river was opened in 1894. It was designed by an engineer named Horace Jones." >doc.txt
"$bin/gmsa" compress doc.txt -o doc.safetensors --merge-size 2 --json
"$bin/gmsa" restore doc.safetensors | tee restored.txt
grep -q "bridge" restored.txt
"$bin/gmsa" ask "When was the bridge opened?" --memory doc.safetensors --json | tee answer.json
grep -q '"soft_tokens"' answer.json
mkdir results
echo '{"meta": {"seed": 0}, "rows": []}' >results/results.json
"$bin/gmsa" eval report results -o report
grep -q "How this was measured" report/report.html report/report.md
if "$bin/gmsa" ask "What?" --context missing.txt; then
    echo "a missing file must fail" >&2
    exit 1
fi
echo "smoke test passed"
