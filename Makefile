# The commands to learn: make demo, make test, make lint, make bench, make wheels.
#
# Everything happens in .venv, which is made on first use from the pinned recipes in requirements/. Two of these commands
# may run at once: set-up is under a lock, ports are chosen free, and build folders are one a purpose.

SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
JOBS ?= $(shell nproc)
CHANNEL_PATH ?= auto
LOCK := flock .setup.lock

NATIVE_SOURCES := CMakeLists.txt $(shell find include src/engine src/host src/testing src/limits tests/native -type f 2>/dev/null)
CORE_SOURCES := pyproject.toml $(NATIVE_SOURCES) $(shell find src/kvlink -name '*.py')
ADAPTER_SOURCES := $(shell find adapters -name '*.py' -o -name pyproject.toml)
PYTHON_TREE := src/kvlink adapters/vllm/src adapters/proxy/src tools benchmarks
CXX_FILES = $(shell git ls-files '*.cc' '*.h')
PYTEST := $(BIN)/python -m pytest -p no:cacheprovider

.PHONY: help demo test test-full lint bench wheels install native sanitize unit conformance conformance-asan e2e clean

help:
	@echo "make demo       two vLLM engines split one request over kvlink (CHANNEL_PATH=tcp forces TCP)"
	@echo "make test       lint, native tests, unit tests, conformance, end-to-end runs"
	@echo "make test-full  every combination"
	@echo "make lint       ruff, mypy --strict, clang-format"
	@echo "make bench      the figures of docs/performance.md"
	@echo "make wheels     dist/*.whl"

# ---- set-up ----------------------------------------------------------------------------------------------------------
$(VENV)/dev.stamp: requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "kvlink's demo and tests need Python >= 3.11; $(PYTHON) is $$($(PYTHON) -V). Try make PYTHON=python3.11"; exit 1; }
	@command -v cmake >/dev/null || { echo "cmake is missing: install cmake >= 3.20"; exit 1; }
	@command -v c++ >/dev/null || { echo "a C++ compiler is missing: install g++ >= 9 or clang >= 10"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements/dev.txt
	@touch $@

$(VENV)/engine.stamp: $(VENV)/dev.stamp requirements/cpu-engine.txt requirements/cpu-engine-nodeps.txt
	@echo "Installing the CPU engine (vLLM and torch, about 2 GB)..."
	$(BIN)/pip install --quiet -r requirements/cpu-engine.txt
	$(BIN)/pip install --quiet --no-deps -r requirements/cpu-engine-nodeps.txt
	@touch $@

dist/core.stamp: $(VENV)/dev.stamp $(CORE_SOURCES)
	@mkdir -p dist && rm -f dist/kvlink-*.whl
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation -w dist -C build-dir=build/wheel .
	@touch $@

dist/adapters.stamp: $(VENV)/dev.stamp $(ADAPTER_SOURCES)
	@mkdir -p dist && rm -f dist/kvlink_vllm-*.whl dist/kvlink_proxy-*.whl
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation -w dist ./adapters/vllm ./adapters/proxy
	@touch $@

$(VENV)/kvlink.stamp: $(VENV)/engine.stamp dist/core.stamp dist/adapters.stamp
	$(BIN)/pip install --quiet --force-reinstall --no-deps dist/kvlink-*.whl dist/kvlink_vllm-*.whl dist/kvlink_proxy-*.whl
	@touch $@

# One process sets up at a time; the second finds the work done.
install:
	@$(LOCK) $(MAKE) --no-print-directory $(VENV)/kvlink.stamp

wheels:
	@$(LOCK) $(MAKE) --no-print-directory dist/core.stamp dist/adapters.stamp
	@ls -l dist/*.whl

# ---- what people run -------------------------------------------------------------------------------------------------
demo: install
	@$(BIN)/python -m tools.demo --path $(CHANNEL_PATH)

# NIXL is what the engine part compares with; it goes into a folder of its own.
build/nixl.stamp:
	@mkdir -p build
	$(BIN)/pip install --quiet --no-deps --target build/nixl nixl==1.5.1 nixl-cu12==1.5.1
	@touch $@

bench: install
	@$(LOCK) $(MAKE) --no-print-directory build/nixl.stamp
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

# ---- checks ----------------------------------------------------------------------------------------------------------
test: lint native sanitize unit conformance e2e

test-full: lint native sanitize
	@$(MAKE) --no-print-directory unit conformance e2e FULL=1
	@$(MAKE) --no-print-directory conformance-asan

lint: install
	$(BIN)/ruff check $(PYTHON_TREE) tests
	$(BIN)/ruff format --check $(PYTHON_TREE) tests
	$(BIN)/mypy --strict src/kvlink
	MYPYPATH=src:adapters/vllm/src $(BIN)/mypy --strict adapters/vllm/src/kvlink_vllm
	MYPYPATH=src:adapters/proxy/src $(BIN)/mypy --strict adapters/proxy/src/kvlink_proxy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

# native-tests(folder, sanitizer): configure, build and run the C++ tests.
define native-tests
	cmake -S . -B build/$(1) -DKVLINK_TESTS=ON -DKVLINK_SANITIZE=$(2) > build-$(1).log 2>&1 || { cat build-$(1).log; exit 1; }
	cmake --build build/$(1) -j $(JOBS) >> build-$(1).log 2>&1 || { tail -50 build-$(1).log; exit 1; }
	cd build/$(1) && ctest --output-on-failure --timeout 300 --no-tests=error
endef

native:
	$(call native-tests,native,)

sanitize:
	$(call native-tests,address,address)
	$(call native-tests,thread,thread)

SLOW := $(if $(FULL),,-m "not slow")

unit: install
	$(PYTEST) $(SLOW) --timeout 300 tests/unit tests/chaos tests/proxy tests/vllm

conformance: install
	$(PYTEST) $(SLOW) --timeout 600 tests/conformance

conformance-asan: install sanitize
	KVLINK_NATIVE_DIR=build/address/lib LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(PYTEST) --timeout 1200 tests/conformance

e2e: install
	$(PYTEST) $(SLOW) --timeout 1200 tests/e2e

clean:
	rm -rf build dist $(VENV) build-*.log .setup.lock
