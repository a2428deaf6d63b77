# Every target first runs .ci/setup, which creates or updates .venv and returns in milliseconds when nothing changed.
# Variables: ARGS="key=value ..." for quickstart and bench, NAME=<file in benchmarks/>, TESTS=<path>, EXTRA=gpu, PYTHON=...
SHELL := /bin/bash
BIN := .venv/bin
PACKAGES := rluf actors cluster
TESTS ?= tests
export EXTRA PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test nightly check .check-types .check-rules docs format bench gpu-check lock clean

help: ## List the targets.
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

setup: ## Create .venv with the tested versions (EXTRA=gpu for CUDA).
	@.ci/setup

quickstart: setup ## Run the main job on the sample log: python -m rluf.train.
	$(BIN)/python -m rluf.train $(ARGS)

test: setup ## Run the tests in two processes: python -m pytest -n 2 --dist loadfile.
	$(BIN)/python -m pytest $(TESTS) -q -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

nightly: setup ## Run the tests that take minutes each (killed and resumed runs, the commands of the docs), and new random examples.
	$(BIN)/python -m pytest tests -q -m "nightly or hypothesis" --hypothesis-profile=random $(ARGS)

check: setup ## Check lint, format, types, the import contract, dead code and the house rules.
	@$(MAKE) --no-print-directory --keep-going --jobs 2 --output-sync=target .check-types .check-rules

.check-types: # the longer of the two
	$(BIN)/mypy $(PACKAGES)
	MYPYPATH=. $(BIN)/mypy benchmarks/*.py

.check-rules:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/vulture
	$(BIN)/python -m pytest tests/house -q

docs: setup ## Build the docs site into build/site; a warning is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

format: setup ## Format the files and fix lint with ruff.
	$(BIN)/ruff check --fix --quiet . ; $(BIN)/ruff format .

bench: setup ## Run one benchmark: make bench NAME=...; its last line is JSON.
	@test -f benchmarks/$(NAME).py || { echo "make bench NAME=...; there are: $$(cd benchmarks && echo *.py)" >&2; exit 2; }
	$(BIN)/python benchmarks/$(NAME).py $(ARGS)

gpu-check: setup ## Check a GPU before the first run: kernels, transport, memory, throughput; reduced on CPUs.
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

lock: setup ## Compile constraints/ from pyproject.toml.
	@.ci/lock

clean: ## Remove the virtual environment and tool caches; runs/ stays.
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build dist *.egg-info
