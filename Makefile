# `make` lists the commands. Everything is installed into .venv, pinned by constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test check gpu bench clean

help: ## list these commands
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | awk -F'\t' '{printf "  make %-7s %s\n", $$1, $$2}'

$(BIN)/burnish: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Burnish needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/dev: $(BIN)/burnish
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

setup: $(VENV)/dev ## make .venv with everything that development needs

demo: $(BIN)/burnish ## fine-tune the embedded base with full, LoRA and QLoRA weights; writes runs/demo/report.html
	$(BIN)/burnish demo out=runs/demo

test: $(VENV)/dev ## run the whole test suite (CPU)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal tests --ignore tests/gpu

check: $(VENV)/dev ## format, lint, types, layers, size budget, structure
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python scripts/structure.py

gpu: $(VENV)/dev ## run the tests that need a CUDA device
	$(BIN)/pytest tests/gpu

.peers/venv/bin/python: benchmarks/peers/wheels.txt benchmarks/peers/device.txt
	-$(PYTHON) benchmarks/peers/fetch.py install .peers/venv

bench: $(VENV)/dev .peers/venv/bin/python ## measure on a CUDA device, beside Unsloth and TRL: every row of docs/performance.md
	for row in qlora qlora-8b lora ragged full small; do $(BIN)/python -m benchmarks.sft row=$$row peers=.peers/venv seconds=1800 || exit 1; done
	$(BIN)/python -m benchmarks.dpo peers=.peers/venv seconds=1800
	$(BIN)/python -m benchmarks.memory seconds=1800
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.page
	$(BIN)/python -m benchmarks.compare

clean: ## delete .venv and caches, never runs/
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .import_linter_cache
