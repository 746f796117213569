# Everything runs in .venv, which is made on first use; a second run installs nothing and needs no network.
#
#   make demo      a real model generates text with its KV cache held by tq_hb
#   make test      C++ tests (also under sanitizers) and Python tests
#   make lint      ruff, mypy, clang-format
#   make bench     the measurements in bench/results and the tables made from them
#   make mutants   seeds faults one at a time and shows that the tests catch each

BIN := .venv/bin
STAMP := .venv/.stamp
PIP_INSTALL := $(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation
CMAKE := $(BIN)/cmake -S . -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc python -type f -not -path '*/__pycache__/*')

EXTRAS_demo := demo
EXTRAS_test := test,lint,transformers,plots,mlx
EXTRAS_lint := lint

.NOTPARALLEL:
.PHONY: demo test ctest pytest lint bench mutants clean

demo: $(STAMP)-demo $(STAMP)-package
	$(BIN)/tq-hb generate $(DEMO_ARGS)

test: ctest pytest

# Two builds: warnings as errors, then address and undefined-behaviour sanitizers. A test asks for more memory than
# there is, which the sanitizer would otherwise report instead of refusing.
ctest: $(STAMP)-venv $(STAMP)-googletest
	$(CMAKE) -B build/test -DCMAKE_BUILD_TYPE=Release -DTQ_HB_PYTHON=OFF -DTQ_HB_BUILD_TESTS=ON -DTQ_HB_WERROR=ON
	$(BIN)/cmake --build build/test
	$(BIN)/ctest --test-dir build/test --output-on-failure
	$(CMAKE) -B build/sanitize -DCMAKE_BUILD_TYPE=RelWithDebInfo -DTQ_HB_PYTHON=OFF -DTQ_HB_BUILD_TESTS=ON \
	  -DTQ_HB_WERROR=ON -DTQ_HB_SANITIZE=address,undefined
	$(BIN)/cmake --build build/sanitize
	ASAN_OPTIONS=allocator_may_return_null=1 $(BIN)/ctest --test-dir build/sanitize --output-on-failure

pytest: $(STAMP)-test $(STAMP)-package
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(STAMP)-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests -name '*.cpp' -o -name '*.h' | xargs $(BIN)/clang-format --dry-run --Werror

bench: $(STAMP)-demo $(STAMP)-test $(STAMP)-package
	$(BIN)/tq-hb generate --out bench/results
	$(BIN)/python -m bench.codec
	$(BIN)/python -m bench.cpu
	$(BIN)/python -m bench.tables

mutants: $(STAMP)-test $(STAMP)-googletest
	$(BIN)/python tests/mutants/run.py

clean:
	rm -rf .venv build dist

$(STAMP)-venv: scripts/setup.sh
	scripts/setup.sh venv
	@touch $@

$(STAMP)-googletest: $(STAMP)-venv
	scripts/setup.sh googletest
	@touch $@

# What an extra needs, the package included.
$(STAMP)-demo $(STAMP)-test $(STAMP)-lint: $(STAMP)-%: $(STAMP)-venv pyproject.toml constraints.txt
	@echo "==> installing tq_hb and its extras '$(EXTRAS_$*)' into .venv"
	$(PIP_INSTALL) '.[$(EXTRAS_$*)]'
	@touch $@ $(STAMP)-package

# Later changes to the sources rebuild the package alone, incrementally.
$(STAMP)-package: $(STAMP)-venv $(SOURCES)
	$(PIP_INSTALL) --no-deps .
	@touch $@
