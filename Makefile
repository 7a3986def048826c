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

NATIVE_SOURCES := CMakeLists.txt $(shell find cmake include src/engine src/host src/testing src/limits tests/native -type f 2>/dev/null)
BACKENDS := hccl hcomm_onesided hixl
BACKEND_SOURCES := $(shell find cmake backends include src/host -type f 2>/dev/null)
CORE_SOURCES := pyproject.toml $(NATIVE_SOURCES) $(shell find src/kvlink -name '*.py')
ADAPTER_SOURCES := $(shell find adapters -name '*.py' -o -name pyproject.toml)
ADAPTERS := vllm proxy lmcache
PYTHON_TREE := src/kvlink backends $(ADAPTERS:%=adapters/%/src) tools benchmarks
CXX_FILES = $(shell git ls-files '*.cc' '*.h')
PYTEST := $(BIN)/python -m pytest -p no:cacheprovider

.PHONY: help demo demo-lmcache test test-full lint bench wheels install native sanitize aarch64 unit conformance conformance-asan \
  ascend e2e clean

help:
	@echo "make demo       two vLLM engines split one request over kvlink (CHANNEL_PATH=tcp forces TCP)"
	@echo "make demo-lmcache  the same through LMCache (DEMO_ARGS=\"--mode pull\")"
	@echo "make test       lint, native tests (x86-64 and aarch64), unit tests, conformance, Ascend, end-to-end runs"
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

# Both lines of LMCache that the adapter supports: one in .venv, the older one in a folder of its own.
$(VENV)/lmcache.stamp: $(VENV)/engine.stamp $(wildcard requirements/lmcache*.txt)
	@echo "Installing LMCache..."
	$(BIN)/pip install --quiet -r requirements/lmcache.txt
	$(BIN)/pip install --quiet --no-deps -r requirements/lmcache-nodeps.txt
	@rm -rf build/lmcache-0.4.4
	$(BIN)/pip install --quiet --no-deps --target build/lmcache-0.4.4 -r requirements/lmcache-0.4.4-nodeps.txt
	@touch $@

dist/core.stamp: $(VENV)/dev.stamp $(CORE_SOURCES)
	@mkdir -p dist && rm -f dist/kvlink-*.whl
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation -w dist -C build-dir=build/wheel .
	$(BIN)/python -m tools.wheel_tag dist/kvlink-*.whl
	@touch $@

# Wheels are for other machines: what CANN this one may have does not matter to them.
dist/backends.stamp: $(VENV)/dev.stamp $(BACKEND_SOURCES)
	@mkdir -p dist && rm -f $(BACKENDS:%=dist/kvlink_%-*.whl)
	@for name in $(BACKENDS); do \
	  $(BIN)/pip wheel --quiet --no-deps --no-build-isolation -w dist -C build-dir=build/wheel-$$name \
	    -C cmake.define.KVLINK_CANN=none ./backends/$$name || exit 1; done
	$(BIN)/python -m tools.wheel_tag $(BACKENDS:%=dist/kvlink_%-*.whl)
	@touch $@

dist/adapters.stamp: $(VENV)/dev.stamp $(ADAPTER_SOURCES)
	@mkdir -p dist && rm -f $(ADAPTERS:%=dist/kvlink_%-*.whl)
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation -w dist $(ADAPTERS:%=./adapters/%)
	@touch $@

$(VENV)/kvlink.stamp: $(VENV)/lmcache.stamp dist/core.stamp dist/backends.stamp dist/adapters.stamp
	$(BIN)/pip install --quiet --force-reinstall --no-deps dist/kvlink-*.whl $(BACKENDS:%=dist/kvlink_%-*.whl) \
	  $(ADAPTERS:%=dist/kvlink_%-*.whl)
	@touch $@

# One process sets up at a time; the second finds the work done.
install:
	@$(LOCK) $(MAKE) --no-print-directory $(VENV)/kvlink.stamp

wheels:
	@$(LOCK) $(MAKE) --no-print-directory dist/core.stamp dist/backends.stamp dist/adapters.stamp
	@ls -l dist/*.whl

# ---- what people run -------------------------------------------------------------------------------------------------
demo: install
	@$(BIN)/python -m tools.demo --path $(CHANNEL_PATH)

demo-lmcache: install
	@$(BIN)/python -m tools.demo.lmcache --path $(CHANNEL_PATH) $(DEMO_ARGS)

# NIXL is what the engine part compares with; it goes into a folder of its own.
build/nixl.stamp:
	@mkdir -p build
	$(BIN)/pip install --quiet --no-deps --target build/nixl nixl==1.5.1 nixl-cu12==1.5.1
	@touch $@

bench: install
	@$(LOCK) $(MAKE) --no-print-directory build/nixl.stamp
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

# ---- checks ----------------------------------------------------------------------------------------------------------
test: lint native sanitize aarch64 unit conformance ascend e2e

test-full: lint native sanitize aarch64
	@$(MAKE) --no-print-directory unit conformance ascend e2e FULL=1
	@$(MAKE) --no-print-directory conformance-asan

lint: install
	$(BIN)/ruff check $(PYTHON_TREE) tests
	$(BIN)/ruff format --check $(PYTHON_TREE) tests
	$(BIN)/mypy --strict src/kvlink
	MYPYPATH=src $(BIN)/mypy --strict $(foreach name,$(BACKENDS),backends/$(name)/src/kvlink_$(name))
	@set -e; for name in $(ADAPTERS); do echo "mypy --strict adapters/$$name"; \
	  MYPYPATH=src:adapters/$$name/src $(BIN)/mypy --strict adapters/$$name/src/kvlink_$$name; done
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

# native-build(folder, settings): configure and build with the C++ tests and all Ascend providers.
define native-build
	cmake -S . -B build/$(1) -DKVLINK_TESTS=ON -DKVLINK_BACKENDS=all -DKVLINK_CANN=none $(2) > build-$(1).log 2>&1 \
	  || { cat build-$(1).log; exit 1; }
	cmake --build build/$(1) -j $(JOBS) >> build-$(1).log 2>&1 || { tail -50 build-$(1).log; exit 1; }
endef

# native-tests(folder, settings): the same, and run the C++ tests.
define native-tests
	$(call native-build,$(1),$(2))
	cd build/$(1) && ctest --output-on-failure --timeout 300 --no-tests=error
endef

native:
	$(call native-tests,native)

sanitize:
	$(call native-tests,address,-DKVLINK_SANITIZE=address)
	$(call native-tests,thread,-DKVLINK_SANITIZE=thread)

# debian(program, packages): installs Debian packages when a program is missing and we may, else says what to type.
define debian
	@command -v $(1) >/dev/null || test $$(id -u) != 0 || test -n "$(NO_APT)" || ! command -v apt-get >/dev/null \
	  || { echo "Installing $(2)..."; { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y \
	    --no-install-recommends -o DPkg::Lock::Timeout=300 $(2); } > build-apt.log 2>&1 || tail -5 build-apt.log; }
	@command -v $(1) >/dev/null || { echo "$(1) is missing; type: apt-get install $(2)"; exit 1; }
endef

# Most NPU servers are aarch64. The programs run under qemu-user, with pages of 4 KiB and of 64 KiB; there is no
# process_vm_readv in it, so the host provider's cma path is left out.
aarch64:
	$(call debian,aarch64-linux-gnu-g++,g++-aarch64-linux-gnu)
	$(call debian,qemu-aarch64,qemu-user)
	$(call native-build,aarch64,-DCMAKE_TOOLCHAIN_FILE=cmake/aarch64-linux-gnu.cmake -DCMAKE_CXX_FLAGS_RELEASE="-O1 -DNDEBUG")
	@set -e; cd build/aarch64; for bytes in 4096 65536; do echo "aarch64, pages of $$bytes bytes"; \
	  QEMU_PAGESIZE=$$bytes QEMU_LD_PREFIX=/usr/aarch64-linux-gnu KVLINK_TEST_EMULATOR=qemu-aarch64 \
	  KVLINK_TEST_WITHOUT_CMA=1 ctest -j $(JOBS) --output-on-failure --timeout 300 --no-tests=error -E '\.cma$$'; done

SLOW := $(if $(FULL),,-m "not slow")

unit: install
	$(PYTEST) $(SLOW) --timeout 300 tests/unit tests/chaos tests/proxy tests/vllm tests/lmcache
	PYTHONPATH=build/lmcache-0.4.4 $(PYTEST) -m "not slow" --timeout 300 tests/lmcache

conformance: install
	$(PYTEST) $(SLOW) --timeout 600 tests/conformance

conformance-asan: install sanitize
	KVLINK_NATIVE_DIR=build/address/lib LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 $(PYTEST) --timeout 1200 tests/conformance

# The Ascend providers on the simulator of CANN, and how they are built.
ascend: install
	$(call debian,valgrind,valgrind)
	$(call native-build,native)
	$(PYTEST) $(SLOW) --timeout 900 tests/cann_sim tests/ascend

e2e: install
	$(PYTEST) $(SLOW) --timeout 1200 tests/e2e

clean:
	rm -rf build dist $(VENV) build-*.log .setup.lock
