# Every target does one thing and sets up what it needs in .venv; a second run reuses it.
#   make demo    make test    make help
# PYTHON chooses the interpreter that makes .venv. VENV= (empty) uses PYTHON as it is, with what is installed.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0

ifeq ($(VENV),)
PY := $(PYTHON)
READY :=
TOOLS :=
else
PY := $(VENV)/bin/python
READY := $(VENV)/.package
TOOLS := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
endif

NATIVE_SOURCES := CMakeLists.txt setup.py pyproject.toml $(shell find csrc -name '*.h' -o -name '*.cpp')

.DEFAULT_GOAL := help
.PHONY: help demo test test-cpp test-python lint format bench doctor gpu-check clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(READY) ## train on real data with SGD, SAM and ASAM; print and draw what came of it
	$(PY) -m examples.digits

test: lint test-cpp test-python ## lint, C++ tests (plain and under sanitizers), Python tests

test-python: $(READY)
	$(PY) -m pytest

test-cpp: $(READY) ## C++ tests, plain and under AddressSanitizer and UBSan
	@$(call ctest_in,build/cpp,)
	@$(call ctest_in,build/cpp-sanitized,address$(comma)undefined)

lint: $(READY) ## ruff, mypy, clang-format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(TOOLS) clang-format --dry-run -Werror $$(find csrc -name '*.h' -o -name '*.cpp')

format: $(READY) ## rewrite the sources in the house format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(TOOLS) clang-format -i $$(find csrc -name '*.h' -o -name '*.cpp')

bench: $(READY) ## step throughput against reference SAM and other peers; writes bench/results/
	$(PY) -m bench.run

doctor: $(READY) ## what this installation can do, and why not more
	$(PY) -m sam_kernels.doctor

gpu-check: ## measure and test on a GPU (not in this version)
	@echo "gpu-check needs the CUDA library, which this version does not contain; nothing was checked." >&2; exit 1

clean: ## remove builds and .venv
	rm -rf build dist *.egg-info sam_kernels/_native*.so sam_kernels/_build.json $(VENV)

comma := ,
define ctest_in
cmake_log=$$(mktemp); \
$(TOOLS) cmake -S . -B $(1) -G Ninja -DSAMK_BUILD_PYTHON=OFF -DSAMK_BUILD_TESTS=ON -DSAMK_SANITIZE=$(2) >$$cmake_log \
  && $(TOOLS) cmake --build $(1) >>$$cmake_log || { cat $$cmake_log; exit 1; }; \
$(TOOLS) ctest --test-dir $(1) --output-on-failure
endef

ifneq ($(VENV),)
# torch goes first and pinned: anything that asks for "torch" would bring the newest, with gigabytes of CUDA.
$(VENV)/.tools: pyproject.toml
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make virtual environments; install its venv package (python3-venv), or call make with VENV= to use it as it is" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(TORCH) numpy
	$(PY) -m pip install --quiet --disable-pip-version-check 'setuptools>=77' cmake ninja pybind11 \
	  scikit-learn matplotlib rich pytorch-optimizer pytest pytest-benchmark hypothesis ruff mypy clang-format
	@touch $@

$(VENV)/.package: $(VENV)/.tools $(NATIVE_SOURCES)
	$(TOOLS) $(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@
endif
