# make demo   install and run the main job on the starter models
# make test   install the test extras and run the tests
#   WORKERS=2           in that many processes; 0: in this one
# make test-fast  what needs no process, training or engine
# make families   the parity ladder on every architecture and on models of real size
# make lint   ruff, mypy strict, import-linter
# make docs   the documentation as a site, in build/site; a warning or a dead link fails
# make release-check  wheel and sdist, twice and in empty environments; leaves them in dist/
# make bench  the benchmarks, alone on the machine; writes their figures into README and docs
# make bench-peers  head to head with what people would pick instead; alone on the machine
# make gpu-check  everything that needs a GPU; gpu-report.txt says what ran, and why not the rest
#   GPU_PYTHON=python3  with this interpreter and what it has: installs nothing
#   GPU_PART=speed      parity, speed, serve or memory alone
#   GPU_DRY=1           the same code on the CPU, with a tiny model

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# The slow files come first (tests/slow.py), whatever they hold. A worker that dies ends the run: with
# another in its place xdist waits for ever for the rest of its file. Compiled modules are kept, whatever the
# environment says: the tests start more than a hundred interpreters.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder \
	--max-worker-restart=0
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: demo test test-fast families lint docs release-check bench bench-peers gpu-check clean

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

$(VENV)/.docs: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[docs]'
	touch $@

demo: $(VENV)/.demo
	$(BIN)/hhdeploy demo

test: $(VENV)/.test
	$(PYTEST)

test-fast: $(VENV)/.test
	$(PYTEST) -m "not slow"

families: $(VENV)/.test
	$(PYTEST) tests/parity --families

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m tests.docs.page_types
	$(BIN)/lint-imports

docs: $(VENV)/.docs
	$(BIN)/python docs/build.py

release-check: $(VENV)/.test
	$(BIN)/python -m tests.release

bench: $(VENV)/.test
	$(BIN)/python -m benchmarks.tables --run

bench-peers: $(VENV)/.test
	$(PIP) -e '.[peers]'
	$(BIN)/python -m benchmarks.tables --run peers

# An interpreter that is given is used as it is.
gpu-check: $(if $(GPU_PYTHON),,$(VENV)/.test)
	$(or $(GPU_PYTHON),$(BIN)/python) -m tests.gpu $(if $(GPU_PART),--part $(GPU_PART)) \
		$(if $(filter-out 0,$(GPU_DRY)),--dry)

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
