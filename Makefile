# Each is complete on a machine with Python 3.10 to 3.13 and make:
#   make install    what a user needs: then .venv/bin/extrema-fast pretrain FOLDER
#   make demo       pretrain on real photographs, evaluate, report, pictures
#   make test       the test suite
# They create .venv, install what they need into it, and run; repeated, they are quick.

PYTHON ?= python3
VENV ?= .venv
# another package index for PyTorch, e.g. its CPU-only wheels (CONTRIBUTING.md), kept for later targets; empty: pip's own
# configuration
TORCH_INDEX ?= $(shell cat $(VENV)/.torch-index 2>/dev/null)
# more arguments for pip install and for pytest
PIP_ARGS ?=
PYTEST_ARGS ?=
# test processes
JOBS ?= 2
# which DALI: dali-cuda13, or dali-cuda12 for an older driver (either also reads images without a GPU)
DALI ?= dali-cuda13
DEMO_OUT ?= runs/demo
# the null GPU (tests/nullgpu/README.md): its environment, torch's version, the tests, one process for each file
NULLGPU_VENV ?= .venv-nullgpu
NULLGPU_TORCH ?= 2.13.0
NULLGPU_TESTS ?= $(wildcard tests/gpu/test_*.py tests/nullgpu/test_*.py)
# more arguments for gpu-check: --out FOLDER, --minutes 20, --only PART ..., --list
GPU_ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install -q $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") $(PIP_ARGS) -c constraints.txt
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# an installation is repeated when one of these changes
INPUTS := setup.py pyproject.toml constraints.txt
READY := $(VENV)/.installed
TEST_READY := $(VENV)/.installed-test
DOCS_READY := $(VENV)/.installed-docs

.DEFAULT_GOAL := help
.PHONY: help demo docs test test-fast coverage test-faults test-tools test-gpu test-nullgpu gpu-check install install-dev shell lint format clean clean-demo
.DELETE_ON_ERROR:

help:  ## this list
	@grep -hE '^[a-z-]+:.*  ## ' Makefile | awk -F ':.*  ## ' '{printf "  make %-12s %s\n", $$1, $$2}'
	@echo "variables: PYTHON=$(PYTHON) VENV=$(VENV) JOBS=$(JOBS) DALI=$(DALI) TORCH_INDEX= PIP_ARGS= PYTEST_ARGS="

install: $(READY)  ## what a user needs, into .venv
	@echo "ready: $(BIN)/extrema-fast pretrain FOLDER (with the environment active, '. $(BIN)/activate': extrema-fast ...)"

shell: $(READY)  ## a shell with the environment active
	@. $(BIN)/activate && exec $${SHELL:-sh}

demo: $(READY)  ## pretrain on photographs, evaluate, write a report and pictures (CPU: minutes)
	@$(BIN)/python -m extrema_fast pretrain photos --out $(DEMO_OUT)
	@$(BIN)/python -m extrema_fast evaluate $(DEMO_OUT)
	@$(BIN)/python -m extrema_fast report $(DEMO_OUT)
	@data="$$($(BIN)/python -c 'import os, skimage; print(os.path.dirname(skimage.__file__))')/data"; \
	$(BIN)/python -m extrema_fast visualize $(DEMO_OUT) "$$data/coffee.png" "$$data/astronaut.png" "$$data/rocket.jpg" \
		--out $(DEMO_OUT)/pictures

docs: $(DOCS_READY)  ## the documentation site, into site/: open site/index.html (Python 3.11 or later)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict -q
	@echo "ready: site/index.html; with search: $(BIN)/python -m http.server -d site"

test: $(TEST_READY)  ## the whole test suite, JOBS processes
	$(PYTEST) -n $(JOBS) --dist worksteal --durations=10 $(PYTEST_ARGS)

test-fast: $(TEST_READY)  ## the same without tests marked slow
	$(PYTEST) -n $(JOBS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

coverage: $(TEST_READY)  ## the whole suite once more, with a table of lines no test reaches
	$(PYTEST) -n $(JOBS) --dist worksteal --cov --cov-report=term $(PYTEST_ARGS)

# many times as many tries as in `make test`, of another seed, and a record of them
TRIES ?= 10
TRY_SEED ?= 1
TRY_RECORD ?= faults.json

test-faults: $(TEST_READY)  ## kills, signals, failing storage, forged files, links: TRIES= TRY_SEED= TRY_RECORD=
	$(PYTEST) tests/faults tests/training/test_kill_data.py --timeout 3600 --tries $(TRIES) --try-seed $(TRY_SEED) --try-record $(TRY_RECORD) $(PYTEST_ARGS)

# timm's own tests come with its source, which is kept here
TIMM_TESTS ?= .cache/timm-tests

test-tools: $(TEST_READY)  ## the encoder in other people's libraries, which it installs, and timm's own tests
	@$(PIP_INSTALL) -e ".[tools]"
	$(match_torchvision)
	@mkdir -p $(TIMM_TESTS)
	$(PYTEST) tests/contract/test_tools.py -s --timm-tests $(TIMM_TESTS) $(PYTEST_ARGS)

test-gpu: $(TEST_READY)  ## only the tests that need a CUDA device
	$(PYTEST) -m gpu $(PYTEST_ARGS)

test-nullgpu:  ## the CUDA path on a null GPU, which needs no device (first time: 5 GB)
	@python3 tests/nullgpu/build.py $(NULLGPU_VENV) --torch $(NULLGPU_TORCH)
	@for file in $(NULLGPU_TESTS); do \
		tests/nullgpu/run $(NULLGPU_VENV) python -m pytest -q --tb=short $$file $(PYTEST_ARGS) || failed="$$failed $$file"; \
	done; test -z "$$failed" || { echo "failed:$$failed" >&2; exit 1; }

# an environment that has everything is used as it is, without network: PYTHON's where it was given, else .venv
GPU_PYTHONS = $(if $(filter command environment,$(word 1,$(origin PYTHON))),$(PYTHON) $(BIN)/python,$(BIN)/python $(PYTHON))
GPU_NEEDS = import pytest, torch, extrema_fast.kernels

gpu-check:  ## what only a GPU shows, in 9 minutes: tests, benchmarks, records (PYTHON=... that has it all)
	@for python in $(GPU_PYTHONS); do \
		if $$python -c '$(GPU_NEEDS)' 2>/dev/null; then exec $$python -m benchmarks gpu_visit $(GPU_ARGS); fi; \
	done; \
	echo "none of $(GPU_PYTHONS) can '$(GPU_NEEDS)': installing (offline: see CONTRIBUTING.md)"; \
	$(MAKE) --no-print-directory install-dev && exec $(BIN)/python -m benchmarks gpu_visit $(GPU_ARGS)

install-dev: $(TEST_READY)  ## everything for development, into .venv

lint: $(TEST_READY)  ## ruff, types (mypy), spelling, and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/codespell .
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/mypy

format: $(TEST_READY)  ## ruff: fix what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean:  ## remove build outputs and caches (.venv and runs stay)
	@rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .coverage .coverage.*
	@find extrema_fast kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

clean-demo:  ## remove the demo's run, so that `make demo` trains again
	@rm -rf $(DEMO_OUT)

$(READY): $(INPUTS)
	$(make_venv)
	@echo "installing extrema_fast into $(VENV) (first time: minutes)"
	@$(PIP_INSTALL) -e ".[train,$(DALI)]"
	@echo "$(TORCH_INDEX)" > $(VENV)/.torch-index
	$(match_torchvision)
	@touch $@

$(DOCS_READY): $(INPUTS)
	$(make_venv)
	@echo "installing what the documentation needs into $(VENV)"
	@$(PIP_INSTALL) -e ".[docs]"
	@touch $@

$(TEST_READY): $(INPUTS)
	$(make_venv)
	@echo "installing what the tests need into $(VENV) (first time: minutes)"
	@$(PIP_INSTALL) -e ".[train,$(DALI),hf,onnx,parquet,dev]"
	@echo "$(TORCH_INDEX)" > $(VENV)/.torch-index
	$(match_torchvision)
	@touch $@ $(READY)

# a venv whose creation was interrupted, or whose Python is gone, has no working pip: it is created again
define make_venv
@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	command -v $(PYTHON) >/dev/null || { \
		echo "$(PYTHON) was not found; install it (Debian: apt-get install python3 python3-venv) or name another: make $(MAKECMDGOALS) PYTHON=..." >&2; exit 1; }; \
	$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || { \
		echo "$(PYTHON) is `$(PYTHON) -V`; Python 3.10 to 3.13 is needed: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot create virtual environments (Debian: apt-get install python3-venv)" >&2; exit 1; }; \
	echo "creating $(VENV) with `$(PYTHON) -V`"; \
	$(PYTHON) -m venv --clear $(VENV) || exit 1; \
fi
endef

# pip may take torch from one index and torchvision from another, built for a GPU and not, or leave an older torchvision
# beside a new torch: timm can import neither then. The pinned torchvision is tried from the index given, from PyTorch's
# index of torch's build, and from pip's own.
define match_torchvision
@if $(BIN)/python -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torchvision"))' \
		&& ! $(BIN)/python -c 'import torchvision' 2>/dev/null; then \
	torch=`$(BIN)/python -c 'import torch; print(torch.__version__)'`; \
	echo "torchvision was not built for torch $$torch: looking for one that is"; \
	for index in $(if $(TORCH_INDEX),"$(TORCH_INDEX)") "https://download.pytorch.org/whl/$${torch##*+}" ""; do \
		$(BIN)/python -m pip install -q --no-deps --force-reinstall --retries 0 --timeout 15 \
			$${index:+--index-url "$$index"} $(PIP_ARGS) -c constraints.txt torchvision 2>/dev/null || continue; \
		$(BIN)/python -c 'import torchvision' 2>/dev/null && exit 0; \
	done; \
	site=`$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'`; \
	cp tests/torchvision_operators.py "$$site" && echo "import torchvision_operators as t; t.define_torchvision_operators()" \
		> "$$site/torchvision_operators.pth"; \
	$(BIN)/python -c 'import torchvision' 2>/dev/null && can="timm can be imported all the same, torchvision's own operators cannot run" \
		|| can="timm cannot be imported, and what needs it says so"; \
	echo "no torchvision for torch $$torch was found: $$can. Name an index that has both (rm -r $(VENV); make TORCH_INDEX=...)," \
		"or take torch as it is on PyPI: pip install torch===$${torch%%+*}" >&2; \
fi
endef
