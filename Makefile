# Every target does one thing and sets up what it needs in .venv; a second run reuses it.
#   make demo    make test    make help
# PYTHON  the interpreter that makes .venv.
# VENV    where it is made; VENV= (empty) uses PYTHON as it is, with the sam_kernels installed there;
#         gpu-check then builds in place with what PYTHON has, and asks no network.
# EXTRAS  what pip installs beside the package; with trainers `make test` runs their tests too.
# TORCH   what pip installs as torch; add --index-url where your index has no small build of it.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
EXTRAS ?= dev,demo,bench,experiments

ifeq ($(VENV),)
PY := $(PYTHON)
BIN := $(dir $(shell command -v $(PYTHON)))
READY :=
BUILT := in-place
TRAINERS :=
else
PY := $(VENV)/bin/python
BIN := $(CURDIR)/$(VENV)/bin
READY := $(VENV)/.package
BUILT := $(READY)
TRAINERS := $(VENV)/.trainers
endif

PIP := $(PY) -m pip install --quiet --disable-pip-version-check
TOOLS := PATH="$(BIN):$$PATH"
CSRC := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
NATIVE := CMakeLists.txt setup.py pyproject.toml $(CSRC)

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-cpp test-python test-trainers lint format bench doctor gpu-check in-place clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(READY) ## train on real data with SGD, SAM and ASAM; print and draw what came of it
	@$(PY) -m examples.digits

test: lint test-cpp test-python ## lint, C++ tests (plain and under sanitizers), Python tests

# One thread each: tests that are about threads ask for them, and the others would wait for each other's.
test-python: $(READY) ## Python tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# One thread each: the models are tiny, and some tests start two processes.
test-trainers: $(TRAINERS) ## install lightning, transformers, accelerate and deepspeed, and test SAM under them
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/trainers -n 2 --dist loadfile

test-cpp: $(READY) ## C++ tests, plain and under AddressSanitizer and UBSan
	@$(call ctest_in,$$($(PLAIN_BUILD)),)
	@$(call ctest_in,build/cpp-sanitized,address$(comma)undefined)

lint: $(READY) ## ruff, mypy, clang-format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	@echo "clang-format --dry-run -Werror csrc"; $(TOOLS) clang-format --dry-run -Werror $(CSRC)

format: $(READY) ## rewrite the sources in the house format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	@echo "clang-format -i csrc"; $(TOOLS) clang-format -i $(CSRC)

bench: $(READY) ## step throughput against reference SAM and other peers; writes bench/results/
	@$(PY) -m bench.run

doctor: $(READY) ## what this installation can do, and why not more
	@$(PY) -m sam_kernels.doctor

# A call's LIMIT counts from here, the build included.
BEGAN := $(or $(BEGAN),$(shell date +%s))

# Processes that stages start somewhere else find the package too.
gpu-check: $(BUILT) ## test and measure on a GPU: STAGE=2 RESUME=1 LIST=1 LIMIT=seconds RESULTS=folder CUDA_ARCHS=90
	@$(TOOLS) BEGAN=$(BEGAN) PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PY) -m bench.gpu

# What is unchanged is not compiled again.
in-place:
	@mkdir -p build; echo "building sam_kernels in place; log in build/in-place.log"
	@$(TOOLS) $(PY) setup.py -q build_ext --inplace >build/in-place.log 2>&1 || { cat build/in-place.log >&2; exit 1; }
	@grep '^sam_kernels: ' build/in-place.log || true

clean: ## remove builds and .venv
	rm -rf build dist *.egg-info sam_kernels/_native*.so sam_kernels/libsam_kernels_cuda.so sam_kernels/_build.json $(VENV)

# Configures, builds and runs the C++ tests in one folder; shows the log of a build that failed.
comma := ,
# Where setup.py has built the package with tools that are still there, its object files serve the tests too.
PLAIN_BUILD = package=build/native-$$($(PY) -c 'import sys; print(sys.implementation.cache_tag)'); \
  make=$$(sed -n 's/^CMAKE_MAKE_PROGRAM:[^=]*=//p' $$package/CMakeCache.txt 2>/dev/null); \
  if [ -x "$$make" ]; then echo $$package; else echo build/cpp; fi

define ctest_in
dir=$(1); echo "ctest in $$dir"; mkdir -p $$dir; \
python=OFF; case $$dir in build/native-*) python=ON;; esac; \
{ $(TOOLS) cmake -S . -B $$dir -G Ninja -DSAMK_BUILD_PYTHON=$$python -DSAMK_BUILD_TESTS=ON -DSAMK_SANITIZE=$(2) \
  && $(TOOLS) cmake --build $$dir; } >$$dir/build.log 2>&1 || { cat $$dir/build.log >&2; exit 1; }; \
$(TOOLS) ctest --test-dir $$dir --output-on-failure
endef

ifneq ($(VENV),)
# torch goes first and pinned: whatever asks for "torch" would bring the newest, with gigabytes of CUDA.
$(VENV)/.tools: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "'$(PYTHON)' is not a Python 3.10 or newer; name one that is: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "'$(PYTHON)' cannot make virtual environments; install its venv package (on Debian python3-venv)," \
	    "or use an environment of your own: make PYTHON=... VENV= ..." >&2; exit 1; }
	@echo "making $(VENV): torch and tools; a few minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) $(TORCH) numpy
	@$(PIP) 'setuptools>=77' 'cmake>=3.20' ninja 'pybind11>=2.12'
	@touch $@

# Without isolation, so that object files are reused and a change in one source costs its own compilation.
$(VENV)/.package: $(VENV)/.tools $(NATIVE)
	@echo "building and installing sam_kernels"
	@$(TOOLS) $(PIP) --no-build-isolation -e '.[$(EXTRAS)]'
	@touch $@

$(VENV)/.trainers: $(VENV)/.package
	@echo "installing the trainers"
	@$(TOOLS) $(PIP) --no-build-isolation -e '.[trainers,deepspeed]'
	@touch $@
endif
