#!/bin/sh
# The benchmark page: run the classification suite, keep its rows, tables and pictures. About an hour on two cores; alone
# on the machine, please. A run that was stopped goes on. Usage: docs/benchmark.sh BIN RUN
set -eu
bin=$1
run=$2
out=docs/benchmark
mkdir -p "$out"
resume=$(test -d "$run" && echo --resume || true)
"$bin/taskvec" bench classification --model smollm2-135m --out "$run" $resume
cp "$run/tables.md" "$out/tables.md"
cp "$run/results.json" docs/results/benchmark.json
picture() {
    chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --virtual-time-budget=6000 \
        --window-size="$2" --screenshot="$out/$1.png" "file://$(realpath "$run")/report.html$3" 2> /dev/null
}
picture report 1280,1500 ''
picture d_ntp 1280,760 '#figure-closeness'
picture phone 500,1100 ''
