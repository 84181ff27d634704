PYTHON ?= python3
BIN := .venv/bin

# The versions that .venv gets: what is developed with, or constraints-lowest.txt, or constraints-highest.txt.
CONSTRAINTS ?= constraints.txt
STAMP := .venv/.installed-$(CONSTRAINTS)

.PHONY: help demo live test ray interpreter ptx lint bench bench-compare where-memory-pays soak aot gpu-preflight gpu-test gpu-warm gpu-bench train docs pictures clean
help:  ## list these commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 20

$(STAMP): setup.py $(CONSTRAINTS) constraints-tools.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[dev]'
	@rm -f .venv/.installed-*
	@touch $@

demo: $(STAMP)  ## stream the shipped story with memory; writes out/demo
	$(BIN)/memflow toy demo --out out/demo

live: $(STAMP)  ## a page on which you type the next prompt while the toy world streams; LIVE_OPTIONS="--port N"
	$(BIN)/memflow serve $(LIVE_OPTIONS)

# One thread per process (tests/conftest.py) and a process per core: two threads on tensors this small only wait.
test: $(STAMP)  ## every test
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal $(TEST_OPTIONS)

# In a folder of its own, so that `make test` takes no longer where this has been called before.
RAY := .venv/ray

$(RAY): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) --target $@ 'ray>=2.60'

ray: $(RAY)  ## memflow generate --ray: actors, commands and writes that are killed, on this machine; make test skips it
	PYTHONPATH=$(CURDIR)/$(RAY) $(BIN)/python -m pytest tests/wan/test_ray.py $(TEST_OPTIONS)

# Other tritons than the one of this torch, each in a folder of its own.
.venv/triton-%: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ triton==$*

# The interpreter needs no GPU.
OTHER_TRITON := .venv/triton-$(TRITON)

interpreter: $(OTHER_TRITON)  ## the tests of the kernels with another triton: make interpreter TRITON=3.9.0
	PYTHONPATH=$(OTHER_TRITON) $(BIN)/python -m pytest --numprocesses auto --dist worksteal \
		tests/kernels/interpreter tests/impl tests/ops $(TEST_OPTIONS)

# TRITON names another one here too. What is compiled stays under build/ptx. PTX_OPTIONS: --only TEXT, --jobs N, and others
ptx: $(if $(TRITON),$(OTHER_TRITON),$(STAMP))  ## every compiled kernel run on a CPU, and barriers taken out: --only 'per query'
	PYTHONPATH=.:tests/ops:$(if $(TRITON),$(OTHER_TRITON)) TRITON_CACHE_DIR=build/ptx/triton \
		$(BIN)/python tests/ptx/run_all.py $(or $(PTX_OPTIONS),--mutations)

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

CASES := -m pytest bench/test_cases.py -o addopts= -q --import-mode=importlib -p no:cacheprovider \
	--benchmark-columns=median,iqr,rounds

# BENCH_OPTIONS: --size NAME, --case PART, --contender PART, --rounds N, --out FOLDER
bench: $(STAMP)  ## what memory costs against every alternative; writes bench/results and its report.html
	$(BIN)/python $(CASES) $(BENCH_OPTIONS)
	$(BIN)/memflow bench --stored

bench-compare: $(STAMP)  ## the same, held against the stored results of this device
	$(BIN)/python $(CASES) --compare $(BENCH_OPTIONS)

where-memory-pays: $(STAMP)  ## the toy world's match rate against overhead, by bank and budget; writes bench/results
	$(BIN)/python -m memflow_ops.bench.where_memory_pays $(PAYS_OPTIONS)

soak: $(STAMP)  ## 2000 chunks with most of the past on disk, against all of it in memory; writes bench/results and a picture
	$(BIN)/python -m memflow_ops.bench.soak $(SOAK_OPTIONS)

# Without a network those that are not installed are left out.
OTHER_TRITONS := .venv/triton-3.6.0 .venv/triton-3.9.0

aot: $(STAMP)  ## every kernel compiled for sm_80 to sm_120, by three tritons; checks and writes bench/results/aot.json
	-@$(MAKE) --no-print-directory --keep-going $(OTHER_TRITONS)
	$(BIN)/python -m memflow_ops.bench.aot --triton $(OTHER_TRITONS) $(AOT_OPTIONS)

gpu-preflight: $(STAMP)  ## without a GPU: every kernel that gpu-test and gpu-bench will launch, compiled
	$(BIN)/python -m memflow_ops.bench.preflight $(PREFLIGHT_OPTIONS)

# On a machine with a GPU: with its own torch and triton and no network. docs/first-gpu-run.md says what each tells.
# OUT: the folder of the results. PART: one part of the benchmarks, see bench/parts.py.
OUT ?= bench/results
ON_GPU := TRITON_CACHE_DIR=$(CURDIR)/build/gpu/triton TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/gpu/inductor \
	CUBLAS_WORKSPACE_CONFIG=:4096:8 $(PYTHON)

gpu-warm:  ## on a GPU: compile all that gpu-test and gpu-bench need, in a process per core; measures nothing
	$(ON_GPU) -m memflow_ops.bench.warm $(WARM_OPTIONS)

# GPU_TEST_OPTIONS: --minutes N, --missing
gpu-test:  ## on a GPU: the kernels, the cache write and CUDA graphs; writes OUT
	$(ON_GPU) -m memflow_ops.bench.gpu_test --out $(OUT) $(GPU_TEST_OPTIONS)

gpu-bench:  ## on a GPU: attention, cache and streams against every alternative; PART=first for one part; writes OUT
	$(ON_GPU) -m memflow_ops.bench.gpu_bench --out $(OUT) $(if $(PART),--part $(PART)) $(GPU_BENCH_OPTIONS)

DOCS := .venv/docs

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[docs]'
	@touch $@

docs: $(DOCS)  ## the pages of docs/ as a site in build/site; every link is checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

pictures: $(STAMP)  ## draw the README's pictures anew
	$(BIN)/memflow toy demo --out build/pictures/with-memory
	$(BIN)/memflow toy generate model/stories/demo.jsonl --memory none --out build/pictures/without-memory
	$(BIN)/python docs/pictures/draw.py build/pictures/with-memory build/pictures/without-memory docs/pictures
	$(BIN)/python docs/pictures/live.py docs/pictures/live.png

train: $(STAMP)  ## retrain the toy world's weights
	$(BIN)/memflow toy train

clean:  ## remove what the other commands made
	rm -rf .venv build out *.egg-info
