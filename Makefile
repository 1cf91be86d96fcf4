# Everything runs in .venv, which the first target that needs it makes: `make demo` on a fresh clone just works.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST_WORKERS ?= auto

export MPLBACKEND := Agg

.DEFAULT_GOAL := help
.PHONY: help setup demo test suite lint format typecheck schema wheels clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## set up .venv with the pinned versions, when something changed

# torch first and alone: see constraints.txt. The build backend before the editable installs, so that they need no
# isolated build, whose own dependencies no constraint would pin.
$(STAMP): constraints.txt pyproject.toml runtime/pyproject.toml converters/pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -c constraints.txt hatchling editables
	$(PIP) install -c constraints.txt --no-build-isolation \
		-e "./runtime[cpu,progress,plot,serve]" -e "./converters[tensorrt]" -e ".[dev]"
	touch $@

demo: $(STAMP) ## the whole way on a small model: export, run, edit
	$(BIN)/titans demo

# One thread a worker: pytest already fills the cores.
test: lint typecheck ## lint, types and every test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile

# Suites that take long or need packages of their own: a test names its suite by a mark.
suite: $(STAMP) ## an optional suite: make suite NAME=crash
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --suite $(NAME)

lint: $(STAMP) ## ruff, rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(STAMP) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

typecheck: $(STAMP) ## mypy, strict, on the three packages
	$(BIN)/mypy

schema: $(STAMP) ## the JSON Schemas of docs/schema, from the code
	$(BIN)/python -m titans_runtime.schema docs/schema

wheels: $(STAMP) ## the three wheels, in dist/
	rm -rf dist
	$(PIP) wheel --no-deps --no-build-isolation --wheel-dir dist ./runtime ./converters .

clean: ## remove what was built, .venv excepted
	rm -rf dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
