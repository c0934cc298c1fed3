# make install    make .venv with everything in it and build the native operations
# make demo       install, then train, evaluate and export a small model on an embedded corpus
# make test       the default tier: no launcher, no GPU, no cluster
# make test-all   every tier that can run on this machine
# make check      ruff and mypy
# make benchmarks each program in benchmarks/
# make gpu-check  on a machine with a GPU, with the Python and torch there (GPU_PYTHON): build, check, train, time

PYTHON ?= python3
BIN := .venv/bin
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
STAMP := .venv/.installed
# Two test files at a time: most tests wait (for a start, a timeout, another rank) more than they compute. A file stays
# in one process, so that its tests share what they have built.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder
# Tests of the cluster tier skip themselves where a tool they need is missing, unless CI=1 says that none may be.
RUNNABLE := $(if $(shell command -v nvidia-smi),,-m "not gpu")

.PHONY: install demo test test-all check benchmarks gpu-check clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt .ci/install.sh
	@bash .ci/install.sh "$(PYTHON)"
	@touch $(STAMP)

demo: install
	@$(BIN)/dsft demo

test: install
	@$(PYTEST) -m "not slow and not launch and not cluster and not gpu"

test-all: install
	@$(PYTEST) $(RUNNABLE)

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmarks: install
	@set -e; for program in benchmarks/*.py; do echo "== $$program"; $(BIN)/python "$$program"; done

gpu-check:
	@$(GPU_PYTHON) benchmarks/gpu/check.py

clean:
	rm -rf .venv build dist *.egg-info
