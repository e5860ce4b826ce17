# `make demo` and `make test` do everything on a fresh Linux machine with Python 3.11 or later and no GPU.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Where CPU builds of torch are kept; a plain `pip install torch` on Linux brings gigabytes of CUDA.
CPU_WHEELS := --extra-index-url https://download.pytorch.org/whl/cpu
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
DEMO := ettin-reranker-demo/openvino-int8

MINUTES ?= 10

MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

.PHONY: demo test test-slow soak interop check wheel docs format clean
demo: $(INSTALLED)  ## export the embedded checkpoint, rank with it, print parity and speed
	$(BIN)/ettin-export --size demo --target openvino --force
	$(BIN)/ettin-rerank $(DEMO) --query "Which planet is known as the Red Planet?" examples/planets.txt
	$(BIN)/ettin-verify $(DEMO)
	$(BIN)/ettin-bench speed $(DEMO)

# Each of two workers on two cores: torch would take both, and its threads would wait for each other.
test: $(INSTALLED)  ## what CI runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(INSTALLED)  ## the tests that take minutes
	$(BIN)/python -m pytest -q -m slow

soak: $(INSTALLED)  ## attacks at full length: about an hour; MINUTES of load on each server
	$(BIN)/python parity_tests/tools/soak.py --minutes $(MINUTES) --json bench/results/soak/$(shell date +%F).json

interop: $(INSTALLED)  ## opens artifacts in other programs (needs node, npm and gigabytes of disk) and writes docs/interop.md
	$(BIN)/python interop/run.py

check: $(INSTALLED)  ## lint, format, types, and the links of all pages
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/python -m pytest -q --noconftest parity_tests/docs/test_links.py

# One wheel for Linux on this kind of processor (published: x86-64) with the attention kernel, for every Python; one
# without it for any other platform.
wheel: $(INSTALLED)  ## both wheels, in dist/
	rm -rf build dist
	$(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist/built .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist dist/built/*.whl
	rm -rf build dist/built
	ETTIN_PURE_WHEEL=1 $(BIN)/python -m pip wheel -q --no-deps --no-build-isolation -w dist .

docs: $(INSTALLED)  ## the documentation as a web site, in site/
	$(MKDOCS)

format: $(INSTALLED)
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) --retries 1 --timeout 10 "torch==$(TORCH)+cpu" $(CPU_WHEELS) 2>/dev/null || $(PIP) "torch==$(TORCH)"
	$(PIP) -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist site ettin-reranker-* *.egg-info .mypy_cache .pytest_cache .ruff_cache
