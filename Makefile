# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
AOT_VENV ?= .venv-aot
PARITY_VENV ?= .venv-parity
WORKERS ?= 2
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) --editable
# The newest JAX needs Python 3.12; a pyenv shim may exist and still not run, so each candidate is asked.
PYTHON_312 = $(firstword $(foreach p,python3.12 $(wildcard $(HOME)/.pyenv/versions/3.12.*/bin/python),$(if $(shell $(p) --version 2>/dev/null),$(p))))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-smoke test test-aot test-parity test-smoke-312 nightly check format clean

help: ## Show this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

demo: $(VENV)/.installed-runtime ## Train, evaluate and report a small mixture of experts on this machine
	$(BIN)/dynamoe demo

demo-smoke: $(VENV)/.installed-runtime ## The demo at the smallest scale, as CI runs it
	$(BIN)/dynamoe demo --smoke

test: $(VENV)/.installed-test ## Run the unit tests; TESTS=path selects some, WORKERS=n runs n at once
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --ignore tests/aot $(TESTS)

test-aot: $(AOT_VENV)/.installed ## Compile the kernels for chips that are not here; its compilers have a .venv of their own
	$(AOT_VENV)/bin/python -m pytest --numprocesses $(WORKERS) --dist worksteal tests/aot

test-parity: $(PARITY_VENV)/.installed ## Hold published model families to transformers, and Triton kernels in its interpreter to float64; torch has a .venv of its own
	$(PARITY_VENV)/bin/python -m pytest --numprocesses $(WORKERS) --dist worksteal -m parity tests/models tests/experiments/commands
	TRITON_INTERPRET=1 $(PARITY_VENV)/bin/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(wildcard tests/kernels/test_triton*.py)

test-smoke-312: ## Run the tests marked smoke on Python 3.12 and the newest JAX, where that Python exists
	@if [ -z "$(PYTHON_312)" ]; then echo "skipped: no working Python 3.12 on this machine"; else \
	  $(MAKE) --no-print-directory test VENV=.venv-3.12 PYTHON="$(PYTHON_312)" TESTS="-m smoke"; fi

nightly: $(AOT_VENV)/.installed ## The full demo, every compile for absent chips, every recipe at its full size; an hour or more
	$(MAKE) --no-print-directory demo
	$(MAKE) --no-print-directory test-aot
	$(AOT_VENV)/bin/python -m dynamoe.experiments.planning.published
	$(AOT_VENV)/bin/python -m dynamoe.experiments.planning.scaling

check: $(VENV)/.installed-dev ## Lint, format, types, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev ## Format the code and fix what the linter can fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environments and every cache
	rm -rf .venv .venv-3.12 .venv-aot .venv-parity build dist dynamoe.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# One stamp per set of extras; a larger set leaves the stamps of the smaller ones behind as well.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"dynamoe needs Python 3.11 or later, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=..." if v < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-runtime: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) .
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) '.[test]'
	@touch $(VENV)/.installed-runtime $@

# Not in the environment of the other tests: there JAX would look for a TPU and a GPU at every start.
$(AOT_VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(AOT_VENV)
	$(AOT_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) \
	  --editable '.[aot]' pytest pytest-xdist hypothesis beartype
	@touch $@

# Not in the environment of the other tests: torch is large.
$(PARITY_VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(PARITY_VENV)
	$(PARITY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS) \
	  --editable '.[parity]' pytest pytest-xdist hypothesis beartype
	@touch $@

$(VENV)/.installed-dev: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(INSTALL) '.[dev]'
	@touch $(VENV)/.installed-runtime $(VENV)/.installed-test $@
