# make demo   set up, then train on this machine's own Python sources and watch the run re-plan itself
# make test   set up, then run every test
# make check  set up, then lint, formatting and types
# make format put the code into the expected format
# make env    set up only
# make clean  remove the virtual environment and the caches (runs/ stays)
#
# Variables: PYTHON=/path/to/python3.13     the interpreter to build on (3.12 or 3.13)
#            VENV_ARGS=--system-site-packages   keep the torch that the environment has
#            EXTRAS=dev,tokenizers          optional parts of pyproject.toml to install
#            TESTS=tests/unit               what make test runs

SHELL := bash
.DEFAULT_GOAL := help

EXTRAS ?= dev
VENV_ARGS ?=
TESTS ?=

VENV := .venv
READY := $(VENV)/.ready-$(EXTRAS)
ACTIVATED := VIRTUAL_ENV="$(CURDIR)/$(VENV)" PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.PHONY: help env demo test check format clean

help:
	@sed -n '/^$$/q; s/^# \{0,1\}//p' Makefile

env: $(READY)
	@echo "$(VENV) is ready"

# What is installed depends on these files and on nothing else, so a second call has nothing to do.
$(READY): pyproject.toml setup.py constraints.txt tools/setup_env.sh
	@VENV_ARGS="$(VENV_ARGS)" EXTRAS="$(EXTRAS)" bash tools/setup_env.sh "$(VENV)"
	@touch $@

demo: $(READY)
	@$(ACTIVATED) python tools/make_demo_data.py --out runs/demo-data
	@$(ACTIVATED) bash examples/laptop/demo.sh

test: $(READY)
	@$(ACTIVATED) python -m pytest $(TESTS)

check: $(READY)
	@$(ACTIVATED) ruff check .
	@$(ACTIVATED) ruff format --check .
	@$(ACTIVATED) mypy

format: $(READY)
	@$(ACTIVATED) ruff check --fix .
	@$(ACTIVATED) ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
