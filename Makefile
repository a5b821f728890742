# Each target sets up what it needs by itself, in .venv, once for each state of the requirements files.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow faults check
.DELETE_ON_ERROR:

demo: .venv/requirements.stamp
	$(BIN)/python main.py fit --config configs/demo.yaml --config configs/solver/rtn.yaml --run_dir runs/demo-rtn
	$(BIN)/python main.py fit --config configs/demo.yaml
	$(BIN)/python main.py compare runs/demo-rtn runs/demo

test: .venv/requirements-dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "not slow"

test-slow: .venv/requirements-dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist worksteal -m slow

faults: .venv/requirements-dev.stamp  # kills, full and broken disks, damaged files: ten minutes on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --kills 200

check: .venv/requirements-dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/requirements-dev.stamp: requirements.txt  # which it includes
.venv/%.stamp: %.txt | $(BIN)/python
	$(BIN)/python -m pip install -r $<
	touch .venv/requirements.stamp $@  # requirements-dev.txt includes that one
