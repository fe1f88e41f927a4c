#!/bin/sh
# The regression page: measure the shipped learners and numbers as text, keep tables and pictures. The learners take
# eleven minutes on two cores, the texts seven; alone on the machine, please. A run that was stopped goes on.
# Usage: docs/regression.sh BIN RUN
set -eu
bin=$1
run=$2
"$bin/taskvec" regress bench --out "$run"
mkdir -p docs/regression
cp "$run/tables.md" docs/results/regression.md
cp "$run"/*.svg docs/regression/
"$bin/python" docs/regression_rows.py "$run/results.json" docs/results/regression.json
