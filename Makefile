# make demo   install and run the main job on the starter models
# make test   install the test extras and run everything
# make lint   ruff, mypy strict, import-linter
# make bench  the benchmarks, alone on the machine
# make gpu-check  everything that needs a GPU; gpu-report.txt says what ran, and why not the rest

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test lint bench gpu-check clean

$(VENV)/.demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing hhdeploy with the extras export, cpu and serve (PyTorch is large: minutes) ..."
	$(PIP) -e '.[export,cpu,serve]'
	touch $@

$(VENV)/.test: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing hhdeploy with the test extras (PyTorch is large: minutes) ..."
	$(PIP) -e '.[test]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/hhdeploy demo

test: $(VENV)/.test
	$(BIN)/python -m pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks

# The plugin in tests/gpu/conftest.py writes and prints the report.
gpu-check: $(VENV)/.test
	$(BIN)/python -m pytest tests/gpu

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
