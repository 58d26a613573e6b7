# Two commands for a fresh machine: `make demo` and `make test`. Both use .venv in this folder.
PYTHON ?= python3.11
BIN := .venv/bin
# Threads that wait by spinning slow one another down where cores are few or shared.
export OMP_WAIT_POLICY ?= PASSIVE
READY := .venv/.ready

.PHONY: demo test test-full lint bench clean

demo: $(READY)
	$(BIN)/octoc demo --out build/demo

test: lint
	$(BIN)/python -m pytest -m "not full"

test-full: lint
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch goes first and alone: other packages' ranges would admit a larger build of it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[tflite,demo,dev]"
	touch $(READY)

clean:
	rm -rf .venv build
