# Every target sets up what it needs: a first `make demo` or `make test` creates .venv by itself.

PYTHON ?= python3
JOBS   ?= 2
# Further arguments for pip, such as an index that has CPU builds.
PIP_ARGS ?=

VENV  := .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-cpp lint types docs bench check format clean

help: ## show this list
	@echo "aotfunc: make <target>"
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: PYTHON=$(PYTHON) (3.11 or newer), JOBS=$(JOBS) (test processes),"
	@echo "  PIP_ARGS (for pip install)"

venv: $(STAMP) ## create .venv with the test tools (other targets do it when needed)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "aotfunc needs Python 3.11 or newer: make PYTHON=python3.11")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e '.[test]'
	@touch $@

demo: $(STAMP) ## train a small network on digits: graphs, per-sample gradients, timings
	$(PY) examples/digits.py

test: $(STAMP) ## run the tests (JOBS processes, one thread each)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS)

test-cpp: $(STAMP) ## the tests with compiled functions on the C++ backend instead of the eager one
	AOTFUNC_BACKEND=cpp OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS)

lint: $(STAMP) ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(STAMP) ## mypy over aotfunc/
	$(PY) -m mypy

docs: $(STAMP) ## run the examples of all pages, and build the documentation site into build/site
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) tests/test_docs.py -k "examples"
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet
	@echo "build/site/index.html: look at it in a browser; to search: $(PY) -m http.server -d build/site"

bench: $(STAMP) ## run the benchmarks that need no GPU (installs the bench extra: jax)
	$(PY) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -e '.[bench]'
	@set -e; for b in capture graphs eager overhead first_use partition inductor_cache maths \
	  clipping cpu sparse; do echo "== $$b"; $(PY) -m benchmarks.$$b; done

check: lint types test ## all that must pass before a change is handed in

format: $(STAMP) ## let ruff fix and format the files
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean: ## remove .venv and all caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
