#!/bin/sh
# The same head patches in transformer-lens 4 and nnsight 0.8, in an environment of their own (they are no dependency).
# Usage, from the project's root: sh benchmarks/peers.sh PYTHON. Prints one JSON object a line: function_vector, peers.
set -eu
python=$1
peers=.venv-peers
if [ ! -f "$peers/installed" ]; then
    "$python" -m venv "$peers"
    "$peers/bin/python" -m pip install --quiet --disable-pip-version-check \
        torch==2.13.0 transformer-lens==4.3.0 nnsight==0.8.1
    touch "$peers/installed"
fi
export HF_HUB_OFFLINE=1
patches=$(mktemp)
trap 'rm -f "$patches"' EXIT
.venv/bin/python benchmarks/function_vector.py --json --save "$patches"
folder=$(.venv/bin/python -c 'from taskvec.lm.load import _converted; print(_converted("smollm2-135m"))')
"$peers/bin/python" benchmarks/peers.py "$folder" "$patches" 2>/dev/null
