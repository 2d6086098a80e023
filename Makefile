# Every target makes the environment that it needs, in .venv, from the committed locks. It takes
# python3, make and PyPI. `make help` lists the targets.

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
WORKERS ?= 2
UV ?= uv

export PIP_DISABLE_PIP_VERSION_CHECK = 1

VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
TAG := py$(subst .,,$(VERSION))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install -qq
LOCK := requirements/lock-$(TAG)

# A stamp says what is installed in the environment, for which Python. Deeper ones hold the ones above.
CORE := $(VENV)/.stamp-$(TAG)-core
TEST := $(VENV)/.stamp-$(TAG)-test
TORCH := $(VENV)/.stamp-$(TAG)-torch
DEV := $(VENV)/.stamp-$(TAG)-dev
DOCS := $(VENV)/.stamp-$(TAG)-docs

.DEFAULT_GOAL := help
.PHONY: help demo test lint smoke bench notebooks docs dist install lock clean
.DELETE_ON_ERROR:

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

demo: $(CORE)  ## score the shipped model under the paper's policies, on the CPU
	@$(BIN)/python -m swaa_jax.cli.main demo

test: $(TEST) $(TORCH)  ## the tests and doctests, without the slow ones
	@$(BIN)/python -m pytest -m "not slow" -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

lint: $(DEV)  ## ruff, the import rules and pyright
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports
	@$(BIN)/pyright

smoke:  ## a short run on the JAX that this PYTHON's lock has, in its own environment
	@$(MAKE) --no-print-directory VENV=.venv-$(TAG) .venv-$(TAG)/.stamp-$(TAG)-test
	@.venv-$(TAG)/bin/python -m pytest -m "not slow" -n $(WORKERS) $(PYTEST_ARGS) \
	    tests/swaa_jax/test_smoke.py tests/swaa_jax/test_load_memory.py tests/swaa_jax/test_runtime.py \
	    tests/swaa_jax/test_old_jax.py $(wildcard tests/kernels_pallas) tests/notebooks/test_execution.py \
	    --deselect tests/notebooks/test_execution.py::test_the_others_run

bench: $(CORE) $(TORCH)  ## attention time and memory against context length, on this machine
	@$(BIN)/python benchmarks/attention_scaling.py

docs: $(DOCS)  ## the documentation as a site, in site/, which needs no network
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

notebooks: $(TEST)  ## execute the notebooks and keep what they print
	@$(BIN)/python notebooks/execute.py

dist: $(DEV)  ## build the wheel and the sdist into dist/, and check them
	@rm -rf dist
	@$(BIN)/python -m hatchling build -d dist
	@$(BIN)/twine check --strict dist/*
	@$(BIN)/check-wheel-contents dist/*.whl

install: $(DEV) $(TORCH)  ## everything that development needs

# Those with -tpu and -cuda are for the images of docker/; libtpu asks for a newer glibc than the rest.
# A line of a lock has the hashes of its files: what is installed is what was locked, whatever an
# index says. Without hashes stays torch.txt alone, whose files differ by index (CPU or CUDA).
lock:  ## make requirements/lock-*.txt again (needs uv; UPGRADE=1 moves to newer versions)
	@for version in 3.11 3.12 3.13; do \
	  name=requirements/lock-py$${version%.*}$${version#*.}; \
	  compile="$(UV) pip compile --quiet --python-version $$version \
	    --python-platform x86_64-manylinux_2_28 --no-emit-index-url --no-header --no-annotate \
	    --generate-hashes \
	    $(if $(UPGRADE),--upgrade) pyproject.toml requirements/build.in"; \
	  $$compile -o $$name.txt && \
	  $$compile --extra test -c $$name.txt -o $$name-test.txt && \
	  $$compile --extra test --extra dev -c $$name-test.txt -o $$name-dev.txt && \
	  $$compile --extra test --extra docs -c $$name-test.txt -o $$name-docs.txt || exit 1; \
	  echo "$$name: $$(grep -oE '^(jax|flax)==[^ ]+' $$name.txt | tr '\n' ' ')"; \
	done
	@for extra in tpu cuda; do \
	  $(UV) pip compile --quiet --python-version 3.11 --python-platform x86_64-manylinux_2_31 \
	    --no-emit-index-url --no-header --no-annotate --generate-hashes pyproject.toml \
	    requirements/build.in --extra $$extra --extra gcs --extra serve \
	    -c requirements/lock-py311.txt -o requirements/lock-py311-$$extra.txt || exit 1; \
	done

clean:  ## remove environments, caches and outputs
	rm -rf .venv .venv-py* build dist site demo_output .pytest_cache .ruff_cache .hypothesis
	rm -rf .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment. One made by another Python, or moved, is made anew.

$(CORE): $(LOCK).txt pyproject.toml
	@if ! $(BIN)/python -c 'import sys; assert "%d.%d" % sys.version_info[:2] == "$(VERSION)"' \
	    2>/dev/null; then \
	  echo "Making $(VENV) with Python $(VERSION)"; $(PYTHON) -m venv --clear $(VENV); \
	fi
	@echo "Installing $(LOCK).txt in $(VENV)"
	@$(PIP) --require-hashes -r $(LOCK).txt
	@$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(TEST): $(LOCK)-test.txt $(CORE)
	@echo "Installing $(LOCK)-test.txt in $(VENV)"
	@$(PIP) --require-hashes -r $(LOCK)-test.txt
	@touch $@

# torch and the TPU compiler are the oracles of the tests. torch is no part of the lock, where its CUDA
# packages would follow: for other Pythons than CI's its wheel may bring gigabytes of them, so that is
# left to you. The compiler is the one that goes with the lock's JAX on this Python.
$(TORCH): requirements/torch.txt requirements/libtpu.txt $(TEST)
ifeq ($(VERSION),3.11)
	@echo "Installing requirements/torch.txt in $(VENV)"
	@$(PIP) -r requirements/torch.txt
	@$(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),\
	  echo "Installing requirements/libtpu.txt in $(VENV)"; \
	  $(PIP) --no-deps --require-hashes -r requirements/libtpu.txt)
else
	@echo "Without torch and the TPU compiler: the tests against Transformers and those that compile" \
	  "for TPUs are skipped on Python $(VERSION). To run them:" \
	  "$(BIN)/pip install -r requirements/torch.txt, and then -r requirements/libtpu.txt"
endif
	@touch $@

$(DEV): $(LOCK)-dev.txt $(TEST)
	@echo "Installing $(LOCK)-dev.txt in $(VENV)"
	@$(PIP) --require-hashes -r $(LOCK)-dev.txt
	@touch $@

$(DOCS): $(LOCK)-docs.txt $(TEST)
	@echo "Installing $(LOCK)-docs.txt in $(VENV)"
	@$(PIP) --require-hashes -r $(LOCK)-docs.txt
	@touch $@

requirements/lock-%.txt:
	@echo "There is no $@: this project is locked for Python 3.11, 3.12 and 3.13," \
	  "and $(PYTHON) is $(or $(VERSION),not found). Choose one: make PYTHON=python3.12 ..." >&2; exit 2
