# make demo: set up and run the default job; make test: set up and pass the tests.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed-$(shell cksum < pyproject.toml | cut -d' ' -f1)

export DO_NOT_TRACK := true

.PHONY: install demo test check lint clean

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(BIN)/python -c "from pathlib import Path; from neft_core.workspace import init_dvc; init_dvc(Path('.'))"
	touch $@

demo: install
	$(BIN)/neft run

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: install
	$(BIN)/python -m pytest -q -m "not integration" -n 2
	$(BIN)/python -m pytest -q -m integration

check: lint test

clean:
	rm -rf work .neft mlflow.db mlruns dvc_plots
