PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Without bytecode files every process compiles the thousands of modules of torch again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo docs test test-all lint clean

# Only the modules that are imported get compiled, when they are. Compiling all takes a minute.
$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --editable '.[dev]'
	touch $@

demo: $(STAMP)
	rm -rf runs/demo
	$(BIN)/pyro-sbp train --arch lenet5 --dataset digits --threads 1 --output-dir runs/demo
	$(BIN)/pyro-sbp bench runs/demo --threads 1

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile -m "not slow"

test-all: $(STAMP)
	$(BIN)/pip install --quiet --no-compile --editable '.[dev,lightning,transformers]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff format $(if $(CI),--check) .
	$(BIN)/ruff check $(if $(CI),,--fix) .
	$(BIN)/python tests/wheel_layout.py imports
	$(BIN)/python tests/wheel_layout.py types

docs: $(STAMP)
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --nitpicky docs docs/_build/html

clean:
	rm -rf $(VENV) build docs/_build *.egg-info
