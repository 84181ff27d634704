PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help demo test lint bench train clean
help:  ## list these commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## stream the shipped story with memory; writes out/demo
	$(BIN)/memflow demo --out out/demo

test: $(STAMP)  ## every test
	$(BIN)/python -m pytest

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## overhead against the memory-free baseline; writes bench/results
	$(BIN)/python -m memflow_ops.bench.run

train: $(STAMP)  ## retrain the toy world's weights
	$(BIN)/memflow train

clean:  ## remove what the other commands made
	rm -rf .venv build out *.egg-info
