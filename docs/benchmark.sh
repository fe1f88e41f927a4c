#!/bin/sh
# The benchmark page: run the classification suite, keep its rows, tables and pictures. 90 minutes on two cores; alone
# on the machine, please. A run that was stopped goes on. Usage:
# [DEVICE=cuda] [JOBS=4] docs/benchmark.sh BIN RUN
set -eu
bin=$1
run=$2
out=docs/benchmark
mkdir -p "$out"
resume=$(test -d "$run" && echo --resume || true)
"$bin/taskvec" bench classification --model smollm2-135m --device "${DEVICE:-cpu}" --jobs "${JOBS:-1}" \
    --out "$run" $resume
cp "$run/tables.md" "$out/tables.md"
cp "$run/results.json" docs/results/benchmark.json
picture() { # name, width, height, part of the page: in a frame, so that it scrolls there
    frame="<!DOCTYPE html><body style='margin:0'><iframe style='border:0;width:$2px;height:$3px' src='report.html$4'></iframe>"
    echo "$frame" > "$run/.frame.html"
    chromium --headless --no-sandbox --disable-gpu --hide-scrollbars --virtual-time-budget=8000 \
        --window-size="$2,$3" --screenshot="$out/$1.png" "file://$(realpath "$run")/.frame.html" 2> /dev/null
    rm "$run/.frame.html"
}
picture report 1280 1500 ''
picture d_ntp 1280 820 '#figure-closeness'
picture accuracy 1280 900 '#accuracy'
picture phone 500 1100 '' # chromium's narrowest window
