# Every target sets .venv up first if that is missing or out of date (.ci/setup; milliseconds when it is not).
# Variables: ARGS="key=value ..." for quickstart and bench, NAME=<file in benchmarks/>, TESTS=<path>, EXTRA=gpu, PYTHON=...
SHELL := /bin/bash
BIN := .venv/bin
OURS := rluf actors cluster
TESTS ?= tests
export EXTRA PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test nightly check docs format bench lock clean

help: ## Say what the targets are.
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile | expand -t 20

setup: ## Make .venv with the tested versions (EXTRA=gpu for CUDA).
	@.ci/setup

quickstart: setup ## From reactions to a better policy on this machine: python -m rluf.train.
	$(BIN)/python -m rluf.train $(ARGS)

test: setup ## Run the tests, two files at a time: python -m pytest -n 2 --dist loadfile.
	$(BIN)/python -m pytest $(TESTS) -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

nightly: setup ## Run the tests that make test leaves out: killed and resumed runs, the commands of the docs (minutes each).
	$(BIN)/python -m pytest tests -q -m nightly $(ARGS)

check: setup ## Lint, format, types, arrows between packages, dead code, house rules.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(OURS)
	MYPYPATH=. $(BIN)/mypy benchmarks/*.py
	$(BIN)/lint-imports
	$(BIN)/vulture
	$(BIN)/python -m pytest tests/house -q

docs: setup ## Build the docs site into build/site; warnings are errors.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: setup ## Let ruff put the files in order.
	$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

bench: setup ## Run one benchmark: make bench NAME=...; its last line is JSON.
	@test -f benchmarks/$(NAME).py || { echo "make bench NAME=...; there are: $$(cd benchmarks && echo *.py)" >&2; exit 2; }
	$(BIN)/python benchmarks/$(NAME).py $(ARGS)

lock: setup ## Compile constraints/ from pyproject.toml.
	@.ci/lock

clean: ## Drop the virtual environment and tool caches (runs/ stays).
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build dist *.egg-info
