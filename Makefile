# What a developer and CI run. Each target makes the virtual environment it needs; `make help` lists them.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

VENV ?= .venv
OLDEST_VENV ?= .venv-oldest
BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check --no-input --root-user-action=ignore
# A python that runs, is new enough and can make virtual environments. $(1): names to try, in order.
find-python = $(shell for name in $(1); do "$$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' \
	>/dev/null 2>&1 && echo "$$name" && break; done)
PYTHON ?= $(call find-python,python3.13 python3.12 python3.11 python3 python)
# The floors of the dependencies have wheels for these two only.
OLDEST_PYTHON ?= $(call find-python,python3.11 python3.12)
WORKERS ?= auto
PYTEST_ARGS ?=

.PHONY: help
help: ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

.PHONY: demo
demo: $(VENV)/.installed-cli ## Save, load lazily, change, save and verify a real disk image
	@$(BIN)/snaploader demo

PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup
# What a change needs to be trusted day by day; the rest has the same tests of properties with more examples.
QUICK := -m "not interop and not slow" --hypothesis-profile=quick
REST := -m "interop or slow or hypothesis"

.PHONY: test
test: $(VENV)/.installed-dev ## Run the tests of every day: 3 minutes on 2 cores
	@$(PYTEST) $(QUICK) $(PYTEST_ARGS)

.PHONY: test-rest
test-rest: $(VENV)/.installed-dev ## Run what test-all has beyond test: kills, chaos, scale, third-party servers
	@$(PYTEST) $(REST) $(PYTEST_ARGS)

.PHONY: test-interop
test-interop: $(VENV)/.installed-dev ## Run against buildbox-casd and BuildGrid (fetched once, 240 MB)
	@$(PYTEST) -m interop $(PYTEST_ARGS)

.PHONY: test-all
test-all: $(VENV)/.installed-dev ## Run all tests and report their coverage
	@$(PYTEST) --cov --cov-report=term $(PYTEST_ARGS)

.PHONY: test-oldest
test-oldest: $(OLDEST_VENV)/.installed ## Run the tests of every day on the oldest dependencies allowed
	@$(PYTEST:$(BIN)%=$(OLDEST_VENV)/bin%) -p no:cacheprovider $(QUICK) $(PYTEST_ARGS)

.PHONY: check
check: $(VENV)/.installed-dev ## Lint, format, types, import walls, generated code
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/mypy --strict examples
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@$(BIN)/lint-imports
	@$(BIN)/python protos/generate.py --check

.PHONY: format
format: $(VENV)/.installed-dev ## Format the code and mend what ruff can mend
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

.PHONY: bench
bench: $(VENV)/.installed-dev ## Run the benchmarks; results go to benchmarks/results/
	@$(BIN)/python -m benchmarks

.PHONY: clean
clean: ## Remove what the other targets made
	rm -rf $(VENV) $(OLDEST_VENV) .venv-3.13 build-output dist .coverage .coverage.* .hypothesis .pytest_cache .mypy_cache .ruff_cache \
		.import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 with venv found (Debian: apt-get install python3-venv)." >&2; exit 1; }
	@echo "Making $(VENV) with $(PYTHON)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "Installing snaploader[$*] into $(VENV)"
	@$(BIN)/python $(PIP_INSTALL) --editable '.[$*]'
	@touch $@

$(OLDEST_VENV)/.installed: pyproject.toml .ci/oldest.txt
	@test -n "$(OLDEST_PYTHON)" || { echo "The oldest dependencies need Python 3.11 or 3.12 with venv." >&2; exit 1; }
	@echo "Making $(OLDEST_VENV) with $(OLDEST_PYTHON)"
	@$(OLDEST_PYTHON) -m venv --clear $(OLDEST_VENV)
	@$(OLDEST_VENV)/bin/python $(PIP_INSTALL) --constraint .ci/oldest.txt --editable '.[aio,cli,fsspec,metrics,otel,postgresql,serve,test,workspace]'
	@touch $@
