#!/bin/sh
# The adaptive page: ten tasks trained on together, six unseen, all controls, three seeds. About three hours on two cores.
# A run that was stopped goes on. Another model is printed, not kept. Usage: docs/adaptive.sh BIN RUN [MODEL]
set -eu
bin=$1
run=$2
model=${3:-smollm2-135m}
resume=$(test -d "$run" && echo --resume || true)
"$bin/taskvec" bench adaptive --model "$model" --method adaptive --method adaptive-ridge --method lora --set lora.rank=33 --seeds 3 \
    --out "$run" $resume
test "$model" = smollm2-135m || exit 0
sed '/^Closeness to few-shot/,$d' "$run/tables.md" > docs/results/adaptive.md
"$bin/python" docs/adaptive_rows.py "$run" docs/results/adaptive_run.json
