#!/bin/sh
# The core's tests under the oldest supported transformers: an environment of its own for that one package, with
# everything else read from the project's environment. Usage: tests/oldest.sh PYTHON
set -eu
python=$1
old=.venv-oldest
if [ ! -f "$old/installed" ]; then
    "$python" -m venv "$old"
    project=$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')
    own=$("$old/bin/python" -c 'import site; print(site.getsitepackages()[0])')
    echo "import site; site.addsitedir('$project')" > "$own/project.pth"
    "$old/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints-oldest.txt transformers
    touch "$old/installed"
fi
"$old/bin/python" -c 'import transformers; print("transformers", transformers.__version__)'
HF_HUB_OFFLINE=1 "$old/bin/python" -m pytest tests/test_architectures.py tests/test_hooks.py tests/test_replay.py -m "not slow and not real"
