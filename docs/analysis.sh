#!/bin/sh
# The analysis page: learned vectors of three tasks under the lens; pictures, and their numbers beside them. Twenty minutes
# on two cores. Usage: docs/analysis.sh BIN RUN [MODEL [DEVICE]]
set -eu
bin=$1
run=$2
model=${3:-smollm2-135m}
device=${4:-cpu}
tasks="past_tense english_spanish sst2"
mkdir -p "$run"
"$bin/python" docs/analysis_vectors.py "$model" "$device" "$run" $tasks
for task in $tasks; do
    for name in early late; do
        own="$run/$task-$name-0"
        beside=$(for other in "$run"/*-early-0 "$run"/*-early-1 "$run"/*-late-0; do
            test "$other" = "$own" || echo "--beside $other"
        done)
        what=$(test $name = early && echo all || echo rotation)
        out="docs/analysis/$model/$task-$name"
        start=$(date +%s)
        "$bin/taskvec" analyze "$own" $beside --what "$what" --device "$device" --out "$run/$task-$name"
        mkdir -p "$out"
        cp "$run/$task-$name"/*.svg "$run/$task-$name"/*.csv "$run/$task-$name/says.json" "$out"
        echo "$task $name: $(($(date +%s) - start)) s" >&2
    done
done
