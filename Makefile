# make demo   from a fresh clone to distilled students, in one command
# make test   every check: format, types, import contract, C++ tests, Python tests
# make docs   the documentation as a site, in build/site/index.html; warnings are errors
# make test-models   the tests that `make test` leaves out: every model of torchvision and timm
# make gpu-bundle   what tools/gpu_check.py needs on a GPU machine without a network
# All of them first create .venv and compile the operators. PYTHON=... selects the interpreter.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet -c constraints.txt
# One process per core, of one thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu)
CPP_TESTS := $(wildcard tests/csrc/*.h tests/csrc/*.cpp tests/emulation/*.h tests/emulation/torch/csrc/stable/*.h tests/emulation/*.cpp tests/emulation/*.cu)

.PHONY: demo test install docs lint ctest pytest test-models gpu-bundle clean

demo: install
	$(BIN)/python classification/demo.py
	$(BIN)/python detection/demo.py

test: lint ctest pytest

install: .venv/installed

# torch first, so that pip need not fetch it a second time into an isolated build environment.
.venv/installed: pyproject.toml setup.py constraints.txt tools/install_detectron2.py $(SOURCES)
	@echo "Setting up .venv: downloading torch and compiling the operators takes some minutes"
	$(PYTHON) -m venv .venv
	$(PIP) torch torchvision
	$(PIP) "setuptools>=77" wheel ninja
	$(PIP) --no-build-isolation -e ".[dev]"
	$(BIN)/python tools/install_detectron2.py
	$(BIN)/python -c "import pcka, pprint; pprint.pprint(pcka.build_info())"
	touch $@

docs: install
	$(BIN)/python -W "ignore::FutureWarning" -m sphinx -E -W --keep-going -q -b html -c docs/site . build/site
	@echo "The site is in build/site/index.html"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(SOURCES) $(CPP_TESTS)
	$(BIN)/mypy
	$(BIN)/mypy setup.py
	$(BIN)/lint-imports

ctest: install
	$(BIN)/cmake -S . -B build -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) \
		-DPython3_EXECUTABLE=$(abspath $(BIN)/python)
	$(BIN)/cmake --build build
	$(BIN)/ctest --test-dir build --output-on-failure

# The tests of a file run in one process, because they share fixtures. Files start in their order:
# xdist would start those of the fewest tests last, of which some take minutes.
pytest: install
	$(PYTEST) --dist loadfile --no-loadscope-reorder -m "not exhaustive"

test-models: install
	$(PYTEST) -m "" tests/classification/models/test_every_model.py

gpu-bundle: install
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python tools/gpu_bundle.py $(BUNDLE)

clean:
	rm -rf .venv build dist output *.egg-info pcka/*.so
