# One environment in .venv, made on first use; every target works on a fresh clone.
# PYTHON: any Python >= 3.12; found on the PATH or under pyenv.
PYTHON ?= $(shell .ci/find_python)
VENV   := .venv
PY     := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
export JAX_PLATFORMS ?= cpu
export TF_CPP_MIN_LOG_LEVEL ?= 2
# LAPACK's threads spin beside other work: BUILD_NOTES, "XLA:CPU, as measured".
export OPENBLAS_NUM_THREADS ?= 1

.PHONY: help install demo test test-all lint format types kernels clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "jaxquant needs Python >= 3.12; set PYTHON=/path/to/python3.12"; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet --editable ".[dev]"
	@touch $@

install: $(STAMP)  ## the virtual environment in .venv

demo: $(STAMP)  ## train, quantize and decode the shipped model (10 minutes on 2 cores)
	$(PY) -m jaxquant.apps.demo

test: $(STAMP)  ## lint and tests; of long tables a fixed sample of the rows
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: $(STAMP)  ## all tests, with every row of the long tables (40 minutes on 2 cores)
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --all-rows

lint: $(STAMP)  ## ruff, without changing anything
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(STAMP)  ## mypy
	$(PY) -m mypy

kernels: $(STAMP)  ## static cost of the TPU kernels against docs/results; UPDATE=1 rewrites it
	$(PY) -m pallas_kernels.static_cost $(if $(UPDATE),--table,--check)

format: $(STAMP)  ## ruff, rewriting files
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:  ## remove the environment and all outputs
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
