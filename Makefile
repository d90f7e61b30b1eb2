# The commands a newcomer types; `make` alone lists them. Needs make and Python 3.11 or newer.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
JOBS ?= 2

# Small models run fastest on one thread each.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help install test demo demo-short lint format types check clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(STAMP) ## create .venv with the package and its tools; PYTHON=... chooses the interpreter

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "There is no $(PYTHON); give one with: make install PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1), holdfast needs 3.11 or newer; give one with: make install PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

test: $(STAMP) ## run all tests, JOBS=2 processes at a time
	$(BIN)/python -m pytest -n $(JOBS)

demo: $(STAMP) ## train five small models and compare what they remember (5 to 10 minutes on two cores)
	$(BIN)/holdfast demo

demo-short: $(STAMP) ## the same, cut short (2 minutes)
	$(BIN)/holdfast demo --short --output runs/demo-short

lint: $(STAMP) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## mend style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## check types
	$(BIN)/mypy

check: lint types test ## lint, types and test

clean: ## remove .venv and what tools have written; runs/ stays
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .coverage
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} +
