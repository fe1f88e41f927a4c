#!/bin/sh
# The oldest supported transformers, in an environment of its own that reads everything else from the project's.
set -eu
python=$1
old=.venv-oldest
if [ ! -f "$old/installed" ]; then
    "$python" -m venv "$old"
    site=$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')
    echo "$site" > "$("$old/bin/python" -c 'import site; print(site.getsitepackages()[0])')/project.pth"
    "$old/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt transformers
    touch "$old/installed"
fi
HF_HUB_OFFLINE=1 "$old/bin/python" -m pytest tests/test_architectures.py tests/test_hooks.py tests/test_replay.py -m "not slow and not real"
