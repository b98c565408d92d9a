# `make demo` and `make test` set themselves up: nothing has to be installed before.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Two processes with one thread each are faster here than one process with many threads: the
# tests are small. Override for another machine: make test WORKERS=8
WORKERS ?= 2
SINGLE_THREADED := OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
TESTS = $(SINGLE_THREADED) $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal \
	--durations 15

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz test-timm test-transformers test-hub compat exhaustive training audit lint format \
	typecheck figures docs docs-check notebooks clean

help:  ## what there is
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|'

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "natten needs Python 3.10 or newer: make PYTHON=python3.x ..."; exit 1; }
	@echo "creating $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(INSTALLED): pyproject.toml setup.py | $(BIN)/python
	@echo "installing natten and what its tests and demo need (the first time takes minutes)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check \
		--editable '.[all]'
	@touch $@

demo: $(INSTALLED)  ## attention over a photograph: a table here, the picture in demo.png
	@$(BIN)/python -m natten.demo

test: lint typecheck  ## everything that CI checks: lint, types, tests (no accelerator needed)
	@$(TESTS) -m 'not gpu and not exhaustive and not interpreted'
	@TRITON_INTERPRET=1 $(TESTS) -m 'interpreted and not exhaustive'

fuzz: $(INSTALLED)  ## random problems, valid and invalid: make fuzz FUZZ="--problems 20000 --seed 7"
	@$(SINGLE_THREADED) $(BIN)/python tests/fuzz.py --workers $(WORKERS) $(FUZZ)

test-timm: $(INSTALLED)  ## timm's own model tests on our models (downloads its source distribution)
	@$(SINGLE_THREADED) $(BIN)/python tests/run_timm_suite.py

test-transformers: $(INSTALLED)  ## DiNAT and Nat of Hugging Face transformers on our operations (pip, network)
	@$(SINGLE_THREADED) $(BIN)/python tests/run_transformers.py

test-hub: $(INSTALLED)  ## diffusers and transformers on our kernels, loaded from a Hub folder (pip, network)
	@$(SINGLE_THREADED) $(BIN)/python tests/run_hub_kernel.py

compat: $(INSTALLED)  ## the suite with the oldest and newest Python, torch, numpy (uv, network, an hour, 5 GB)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check uv
	@$(SINGLE_THREADED) $(BIN)/python tests/compatibility.py --workers $(WORKERS)

exhaustive: $(INSTALLED)  ## tests that take many minutes: listed tiles, interrupted compilations, missing packages
	@$(TESTS) --timeout 3600 -m 'exhaustive and not gpu and not interpreted'

training: $(INSTALLED)  ## loss curves of all backends, precisions and ways to share work (a quarter of an hour)
	@$(SINGLE_THREADED) $(BIN)/python benchmarks/training.py

audit: $(INSTALLED)  ## known vulnerabilities of what is installed (network)
	@$(PYTHON) -m venv build/audit
	@build/audit/bin/python -m pip install -qq --disable-pip-version-check pip-audit==2.10.1
	@$(BIN)/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' > build/installed.txt
	@build/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement build/installed.txt

lint: $(INSTALLED)  ## ruff: lint rules and format, changing nothing
	@$(BIN)/ruff check --quiet . && $(BIN)/ruff format --check --quiet . || \
		{ echo "lint failed: 'make format' mends most of it"; exit 1; }

format: $(INSTALLED)  ## ruff: mend what can be mended, then format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

typecheck: $(INSTALLED)  ## mypy on the public surface
	@$(BIN)/mypy

figures: $(INSTALLED)  ## draw docs/figures again
	@$(BIN)/python docs/figures.py

docs: $(INSTALLED)  ## the documentation site, in site/; warnings are errors
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict && echo "open site/index.html"

docs-check: docs  ## the site in a headless Chromium: every page, two widths, light and dark, the search
	@$(BIN)/python -m pip install -qq --disable-pip-version-check playwright
	@$(BIN)/python tests/check_site.py site --screenshots build/screenshots

notebooks: $(INSTALLED)  ## run all notebooks on the CPU and store their outputs
	@cd notebooks && failed=0 && for script in *.py; do \
		echo "$$script"; \
		PYTHONWARNINGS=ignore ../$(BIN)/jupytext --quiet --to ipynb --execute "$$script" || failed=1; \
	done; exit $$failed

clean:  ## remove what builds and runs leave behind, not .venv
	@rm -rf build dist site *.egg-info demo.png demo-time.png .pytest_cache .ruff_cache .mypy_cache .hypothesis
	@find natten models tests benchmarks docs -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null \
		|| true
