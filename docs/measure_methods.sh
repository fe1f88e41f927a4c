#!/bin/sh
# Measure docs/methods/results.md: every method on four word tasks and two sets of StaICC, three seeds. Alone on the
# machine, please. Usage: docs/measure_methods.sh BIN [TASK ...]
set -eu
bin=$1
shift
out=docs/results
vectors="hendel function-vector linear learned learnable state-vector i2cl icv elicit"
rivals="lora prefix-tuning prompt-tuning"
for task in ${*:-past_tense plural capitalize english_spanish sst2 trec}; do
    methods="$vectors $rivals"
    case $task in sst2 | trec) methods="$methods linear-probe calibration" ;; esac
    set --
    for method in $methods; do set -- "$@" --method "$method"; done
    "$bin/taskvec" eval "$task" "$@" --set i2cl.epochs=20 --seed 0 --seed 1 --seed 2 --json > "$out/.new.json"
    mv "$out/.new.json" "$out/methods_$task.json"
    echo "$task" >&2
done
