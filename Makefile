# `make main-job` and `make test` set up all they need: a virtual environment in .venv, the
# package with LIBERO, and the system libraries for rendering.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: help venv main-job test check lint types clean

help:
	@echo "make main-job  CFGRL on real LIBERO: evaluation, training, evaluation, a report"
	@echo "make test      install and run the tests"
	@echo "make check     lint, types and the fast tests, in about two minutes"
	@echo "make lint      ruff;  make types  mypy;  make clean  remove what was made here"

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[libero,dev]'
	sh tools/system_libraries.sh $(BIN)/python
	touch $@

venv: $(VENV)/installed

main-job: venv
	$(BIN)/python benchmarks/study/main_job.py

test: venv
	$(BIN)/python -m pytest

check: lint types
	$(BIN)/python -m pytest -m "not libero and not slow"

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv
	$(BIN)/mypy -p cfgrl_gym

clean:
	rm -rf build $(VENV) *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
