# The two commands:  make run  (sets up, then grows a network on real data)   make test  (sets up, then checks everything)

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
WORKERS ?= 2
ARGS   ?=

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input --constraint constraints.txt

# Two processes on two cores: more threads would only fight over them.
export OMP_NUM_THREADS ?= 1

# On a machine with a GPU: identity, isolation, no waiting, CUDA
# graphs, and every kernel against its reference on the real card.
GPU_TESTS := tests/test_dormant.py tests/test_isolation.py tests/test_on_gpu.py tests/test_restore_on_gpu.py tests/test_compiled.py tests/test_compiled_modes.py
GPU_PYTHON ?= $(BIN)/python

.PHONY: run test test-long test-gpu lint format bench clean
.DEFAULT_GOAL := run

run: $(VENV)/.run-ready
	@$(BIN)/esper run $(ARGS)

test: lint
	@$(BIN)/python -m pytest -n $(WORKERS) --cov --cov-report=term $(ARGS)

test-long: $(VENV)/.dev-ready
	@$(BIN)/python -m pytest -m long $(ARGS)

# With GPU_PYTHON=python3 it takes the machine's own Python: PyTorch, Triton, msgspec, safetensors, pytest, hypothesis.
test-gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(VENV)/.dev-ready)
	@GPU_TESTS="$(GPU_TESTS)" PYTHON=$(GPU_PYTHON) sh tests/on_gpu.sh $(ARGS)

lint: $(VENV)/.dev-ready
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/lint-imports

format: $(VENV)/.dev-ready
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(VENV)/.dev-ready
	@$(BIN)/esper bench $(ARGS)

clean:
	rm -rf $(VENV) build dist .coverage .coverage.* htmlcov

# An empty file marks a finished set-up; it is redone only when what it was made from changes.
$(VENV)/.run-ready: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV) (once, some minutes) ..."
	@$(PIP) --editable '.[demo]'
	@touch $@

$(VENV)/.dev-ready: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Setting up $(VENV) with the development tools (once, some minutes) ..."
	@$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.run-ready

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Esper needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; say make PYTHON=/path/to/python3.11")'
	@$(PYTHON) -m venv $(VENV)
