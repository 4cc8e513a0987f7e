# Everything a developer does here by hand, under one name each. `make` alone lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := sh tests/support/install_packages.sh
# Two workers: the machines this must run on have two cores, and booting guests takes one each.
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-boot test-browser check format bench docs clean
.DELETE_ON_ERROR:
.SUFFIXES:

help:  ## list what can be done
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

setup: $(VENV)/.developer $(VENV)/.machines  ## install everything: packages, .venv, godwit in it, the tools of development
	@echo "Ready: $(BIN)/godwit --help"

demo: $(VENV)/.product $(VENV)/.machines  ## see it work: build a VM, replicate it, change it, restore it, boot what was restored
	@$(BIN)/python -m tests.support.demo

test: setup  ## run every test, those that boot virtual machines included (some minutes)
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup $(ARGS)

test-boot: setup  ## start virtual machines of every layout that the converter knows (a quarter of an hour)
	GODWIT_BOOT=all $(BIN)/pytest -m boot $(ARGS)

test-browser: $(VENV)/.browser  ## open the report of health in Chromium: accessibility, hostile names, size
	GODWIT_BROWSER=1 $(BIN)/pytest -m browser $(ARGS)

check: setup  ## what CI runs: format, lint, types (Linux and Windows), layers, every test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy --platform win32
	$(BIN)/lint-imports
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup $(ARGS)

format: $(VENV)/.developer  ## format the code and mend what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.developer  ## measure speed and memory beside this machine's limits
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(VENV)/.product  ## write docs/cli.md anew from the commands
	$(BIN)/python -m cli.reference > docs/cli.md

clean:  ## remove what was made here, .venv and the demo included
	rm -rf $(VENV) .demo .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: each stands for something installed, and is older than what it was installed from when that changes.

$(VENV)/.python:
	@$(PACKAGES) python
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Python 3.11 or later is needed, this is {v.major}.{v.minor}; choose another with make PYTHON=...")'
	@echo "Creating $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/.product: pyproject.toml | $(VENV)/.python
	@echo "Installing godwit and its libraries into $(VENV)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.developer: pyproject.toml | $(VENV)/.python
	@echo "Installing godwit, its libraries and the tools of development into $(VENV)"
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable . --group dev
	@touch $(VENV)/.product $@

$(VENV)/.browser: $(VENV)/.developer tests/support/install_packages.sh
	@$(PACKAGES) browser
	@$(BIN)/pip install --quiet --disable-pip-version-check --group browser
	@touch $@

$(VENV)/.machines: tests/support/install_packages.sh | $(VENV)/.python
	@$(PACKAGES) machines
	@touch $@
