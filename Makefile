PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: help demo test lint bench gpu-test gpu-bench train clean
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

gpu-test:  ## the kernels on a GPU, with this machine's own torch and triton; writes nothing
	@$(PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('gpu-test: no CUDA device')" || exit 2
	$(PYTHON) -m pytest tests/gpu

gpu-bench:  ## attention with memory against its window on a GPU; writes $$OUT or bench/results
	@$(PYTHON) -c "import sys, torch; torch.cuda.is_available() or sys.exit('gpu-bench: no CUDA device')" || exit 2
	$(PYTHON) -m memflow_ops.bench.run --device cuda --rounds 50 --out $${OUT:-bench/results}

train: $(STAMP)  ## retrain the toy world's weights
	$(BIN)/memflow train

clean:  ## remove what the other commands made
	rm -rf .venv build out *.egg-info
