# Everything runs in .venv, which is made on first use; a second run installs nothing and needs no network.
#
#   make demo      a real model generates text with its KV cache held by tq_hb
#   make test      C++ tests (also under sanitizers, and for 64-bit ARM) and Python tests
#   make lint      ruff, mypy, clang-format, the rules for Metal kernels
#   make bench     the measurements in bench/results and the tables made from them
#   make mutants   seeds faults one at a time and shows that the tests catch each

BIN := .venv/bin
STAMP := .venv/.stamp
PIP_INSTALL := $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation
CMAKE := $(BIN)/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc python -type f -not -path '*/__pycache__/*')
TEST_SOURCES := $(shell find tests/cpp tests/metal_sim -type f -not -path '*/__pycache__/*')

EXTRAS_demo := demo
EXTRAS_test := test,lint,transformers,plots,formats
EXTRAS_lint := lint
EXTRAS_peers := peers

# Without a Metal GPU the tests use a simulated one; the sanitizers then need clang throughout.
ifeq ($(shell uname),Darwin)
  METAL := auto
else
  METAL := simulator
  SANITIZE_CXX = -DCMAKE_CXX_COMPILER=$$(scripts/setup.sh clang)
endif

# One build has both the package that Python tests and the C++ tests: kernels take long to compile. Warnings are errors.
BUILD_test := -Cbuild-dir=build/test -Ccmake.define.TQ_HB_METAL=$(METAL) -Ccmake.define.TQ_HB_BUILD_TESTS=ON \
  -Ccmake.define.TQ_HB_WERROR=ON
BUILD_lint := $(BUILD_test)

.NOTPARALLEL:
.PHONY: help demo test ctest ctest-arm64 pytest lint bench mutants clean

help:
	@sed -n 's/^#   make/make/p' $(firstword $(MAKEFILE_LIST))

demo: $(STAMP)-demo $(STAMP)-package
	$(BIN)/tq-hb generate $(DEMO_ARGS)

test: ctest ctest-arm64 pytest

# Three builds: that of the package, then address and undefined-behaviour sanitizers, then the thread sanitizer for what
# starts threads. The sanitizers' leave out AVX-VNNI, which takes minutes to compile and is AVX2 but for one instruction,
# and have the debug information that their reports need. A test asks for more memory than there is, which the sanitizer
# would otherwise report instead of refusing.
SANITIZED := -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO='-O2 -g1 -DNDEBUG' -DTQ_HB_PYTHON=OFF \
  -DTQ_HB_BUILD_TESTS=ON -DTQ_HB_WERROR=ON -DTQ_HB_AVXVNNI=OFF

ctest: $(STAMP)-package-test
	$(BIN)/ctest --test-dir build/test --output-on-failure --parallel 2
	$(CMAKE) -B build/sanitize $(SANITIZED) -DTQ_HB_SANITIZE=address,undefined -DTQ_HB_METAL=$(METAL) $(SANITIZE_CXX)
	$(BIN)/cmake --build build/sanitize
	ASAN_OPTIONS=allocator_may_return_null=1 $(BIN)/ctest --test-dir build/sanitize --output-on-failure --parallel 2
	$(CMAKE) -B build/thread $(SANITIZED) -DTQ_HB_SANITIZE=thread -DTQ_HB_METAL=off $(SANITIZE_CXX)
	$(BIN)/cmake --build build/thread --target test_ops test_cpu
	$(BIN)/ctest --test-dir build/thread --output-on-failure --tests-regex '^test_(ops|cpu)[.]' --parallel 2

# The C++ tests built for 64-bit ARM and run under QEMU: for correctness, no time is measured there. The compiler
# contracts a*b+c there unless it is told not to, so there's no need of test_codec_contracting.
ifneq ($(and $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),$(shell command -v apt-get)),)
ARM64_TESTS := test_core test_codec test_ops test_cpu
ARM64_TOOLCHAIN := -DCMAKE_TOOLCHAIN_FILE=$(CURDIR)/tests/cpp/arm64.cmake \
  -DCMAKE_FIND_ROOT_PATH=$(CURDIR)/build/arm64-googletest/installed -DCMAKE_BUILD_TYPE=Release

ctest-arm64: $(STAMP)-venv $(STAMP)-arm64
	$(CMAKE) -B build/arm64 $(ARM64_TOOLCHAIN) -DTQ_HB_PYTHON=OFF -DTQ_HB_BUILD_TESTS=ON -DTQ_HB_WERROR=ON \
	  -DTQ_HB_METAL=off
	$(BIN)/cmake --build build/arm64 --target $(ARM64_TESTS)
	$(BIN)/ctest --test-dir build/arm64 --output-on-failure --exclude-regex contracting --parallel 2
else
ctest-arm64:
	@echo "==> skipping the tests for 64-bit ARM: they are cross-compiled on x86-64 Debian and Ubuntu alone"
endif

pytest: $(STAMP)-test $(STAMP)-package-test
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(PYTEST_ARGS)

lint: $(STAMP)-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests bench \( -name '*.cpp' -o -name '*.h' -o -name '*.mm' -o -name '*.cu' -o -name '*.cuh' \) \
	  | xargs $(BIN)/clang-format --dry-run --Werror
	[ $(METAL) != simulator ] || $(BIN)/python tests/metal_sim/translate.py -I csrc check csrc/metal/kernels/tq_hb.metal

bench: $(STAMP)-demo $(STAMP)-test $(STAMP)-peers $(STAMP)-package
	$(BIN)/tq-hb generate --out bench/results
	$(BIN)/python -m bench.codec
	$(BIN)/python -m bench.rate_distortion
	$(BIN)/python -m bench.cpu
	$(BIN)/python -m bench.cpu_kernels
	$(BIN)/python -m bench.cpu_append
	$(BIN)/python -m bench.peers.llama_cpp
	$(BIN)/python -m bench.peers_cpu
	$(BIN)/python -m bench.tables

mutants: $(STAMP)-test
	$(BIN)/python tests/mutants/run.py $(MUTANTS_ARGS)

clean:
	rm -rf .venv build dist

$(STAMP)-venv: scripts/setup.sh
	scripts/setup.sh venv
	@touch $@

$(STAMP)-googletest: $(STAMP)-venv
	scripts/setup.sh googletest
	@touch $@

$(STAMP)-arm64: $(STAMP)-venv tests/cpp/arm64.cmake
	scripts/setup.sh arm64
	$(BIN)/cmake -S /usr/src/googletest -B build/arm64-googletest -G Ninja \
	  -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja $(ARM64_TOOLCHAIN) -DBUILD_GMOCK=OFF \
	  -DCMAKE_INSTALL_PREFIX=$(CURDIR)/build/arm64-googletest/installed
	$(BIN)/cmake --build build/arm64-googletest --target install
	@touch $@

$(STAMP)-metal-sim: $(STAMP)-venv
	scripts/setup.sh metal-sim
	@touch $@

$(STAMP)-test $(STAMP)-lint: $(STAMP)-metal-sim $(STAMP)-googletest

# What an extra needs, the package included: for tests and lint with the Metal that tests use, which serves others too.
$(STAMP)-demo $(STAMP)-test $(STAMP)-lint $(STAMP)-peers: $(STAMP)-%: $(STAMP)-venv pyproject.toml constraints.txt
	@echo "==> installing tq_hb and its extras '$(EXTRAS_$*)' into .venv"
	@rm -f $(STAMP)-package-test
	$(PIP_INSTALL) $(BUILD_$*) '.[$(EXTRAS_$*)]'
	@touch $@ $(STAMP)-package
	@[ "$(BUILD_$*)" != "$(BUILD_test)" ] || touch $(STAMP)-package-test

# Later changes to the sources rebuild the package alone, incrementally.
$(STAMP)-package: $(STAMP)-venv $(SOURCES)
	@rm -f $(STAMP)-package-test
	$(PIP_INSTALL) --no-deps .
	@touch $@

$(STAMP)-package-test: $(STAMP)-metal-sim $(STAMP)-googletest $(SOURCES) $(TEST_SOURCES)
	@echo "==> building tq_hb and its C++ tests, for some minutes; build/test/.ninja_log says how far that is"
	$(PIP_INSTALL) --no-deps $(BUILD_test) .
	@touch $@ $(STAMP)-package
