#!/bin/sh
# The adaptive page: ten tasks trained on together, six unseen, all controls, three seeds. About three hours on two cores.
# A run that was stopped goes on. Usage: docs/adaptive.sh BIN RUN
set -eu
bin=$1
run=$2
resume=$(test -d "$run" && echo --resume || true)
"$bin/taskvec" bench adaptive --method adaptive --method adaptive-ridge --method lora --set lora.rank=33 --seeds 3 \
    --out "$run" $resume
cp "$run/tables.md" docs/results/adaptive.md
"$bin/python" docs/adaptive_rows.py "$run" docs/results/adaptive_run.json
