#!/bin/sh
# Measure what README and docs quote. Alone on the machine, please. Usage: docs/measure.sh BIN
set -eu
bin=$1
out=docs/results
keep() { mv "$out/.new.json" "$out/$1.json"; echo "$1" >&2; }
"$bin/taskvec" demo --json > "$out/.new.json"; keep demo
for name in replay shared_prefix learned_step function_vector learnable_step bench; do
    "$bin/python" "benchmarks/$name.py" --json > "$out/.new.json"; keep "bench_$name"
done
"$bin/python" benchmarks/adaptive.py --json > "$out/.new.json"; keep speed_adaptive
sh benchmarks/peers.sh "${PYTHON:-python3}" | tail -1 > "$out/.new.json"; keep peers
for task in past_tense plural capitalize examples/reviews.jsonl; do
    "$bin/taskvec" eval "$task" --seed 0 --seed 1 --seed 2 --json > "$out/.new.json"
    keep "eval_$(basename "$task" .jsonl)"
done
