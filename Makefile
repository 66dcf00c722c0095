# Everything runs in .venv, made with the standard library's venv and pip; uv works as well (CONTRIBUTING.md).
# constraints.txt pins every version, so each pip call names it.

PYTHON ?= python3
VENV := .venv
PEERS := .venv-peers
BIN := $(VENV)/bin
PIP_INSTALL := -m pip --disable-pip-version-check install -qq -c constraints.txt
INSTALLED := $(VENV)/.installed
PEERS_INSTALLED := $(PEERS)/.installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow lint types format bench peers wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' Makefile

install: $(INSTALLED)  ## make .venv with the package, its extras for search and evaluation, and the tools

quickstart: $(INSTALLED)  ## run recipes/quickstart.yaml: a table, a report and three searches
	$(BIN)/f2llm run recipes/quickstart.yaml

test: lint types  ## lint, types and the fast tests (under 10 minutes on 2 cores)
	$(BIN)/python -m pytest

test-slow: $(INSTALLED)  ## the tests marked slow (under 25 minutes on 2 cores)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)  ## ruff: rules and layout
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)  ## mypy, strict
	$(BIN)/mypy

format: $(INSTALLED)  ## let ruff lay out the code and repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## run every benchmark and write docs/benchmarks.md (after `make peers`, if they are wanted)
	$(BIN)/python benchmarks/run_all.py

peers: $(PEERS_INSTALLED)  ## make .venv-peers, where benchmarks run the peers that need versions of their own

wheel: $(INSTALLED)  ## build the wheel into dist/
	$(BIN)/python -m hatchling build --target wheel

clean:  ## remove the environments, caches and builds; runs/ stays
	rm -rf $(VENV) $(PEERS) build dist .mypy_cache .pytest_cache .ruff_cache
	find src tests benchmarks -type d -name __pycache__ -prune -exec rm -rf {} +

# The stamp is newer than what it was made from, so make installs again only when one of these changes.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("f2llm needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another with make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	@echo 'Installing into $(VENV), once: about a minute and 2 GB of disk'
	$(BIN)/python $(PIP_INSTALL) hatchling
	$(BIN)/python $(PIP_INSTALL) --no-build-isolation --editable '.[search,eval,data,ray,lora,tensorboard,export,serve,dev]'
	@touch $@

# Peers may need other versions of anything but torch, so that one pin is all they share with .venv.
$(PEERS_INSTALLED): benchmarks/peers.txt constraints.txt
	$(PYTHON) -m venv $(PEERS)
	grep '^torch==' constraints.txt > $(PEERS)/constraints.txt
	$(PEERS)/bin/python -m pip --disable-pip-version-check install -qq -c $(PEERS)/constraints.txt -r benchmarks/peers.txt
	@touch $@
