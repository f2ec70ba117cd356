# make demo: set up and run the default job; make test: set up and pass the tests;
# make install: set up alone; make lint: style and types; make check: lint and test;
# make up: Prefect, MLflow and a worker, left running; make deploy: their deployments; make down: stop
# exactly these; make test-peft: PEFT's own tests, with adapters of this method; make bench: the cost
# of a training step, every method side by side, and of scoring and analyses beside reading (on an
# idle machine).
# The first of these names that is Python 3.11 or newer; PYTHON=... chooses another.
PYTHON ?= $(shell for name in python3.11 python3; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && \
	echo $$name && break; done)
VENV := .venv
BIN := $(VENV)/bin
# Modules are compiled on all cores afterwards; pip would do it on one.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile
STAMP := $(VENV)/installed-$(shell cksum < pyproject.toml | cut -d' ' -f1)

export DO_NOT_TRACK := true

.PHONY: install demo test test-slow test-peft check lint bench up down deploy clean

install: $(STAMP)

$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || \
	{ echo "make: no Python 3.11 found; install it, or give PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[dev]'
	$(BIN)/python -W ignore -m compileall -q -j 0 $(VENV)/lib >/dev/null || true
	$(BIN)/python -c "from pathlib import Path; from neft_core.workspace import init_dvc; init_dvc(Path('.'))"
	touch $@

demo: install
	$(BIN)/neft run

# Prefect, MLflow and a worker on this machine, which stay: docs/operations.md.
HOST ?= 127.0.0.1
PREFECT_PORT ?= 4200
MLFLOW_PORT ?= 5000

up: install
	$(BIN)/neft up --host $(HOST) --prefect-port $(PREFECT_PORT) --mlflow-port $(MLFLOW_PORT)

down:
	$(BIN)/neft down

deploy: install
	$(BIN)/neft deploy

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: install
	$(BIN)/python -m pytest -q -m "not integration and not slow" -n 2
	$(BIN)/python -m pytest -q -m "integration and not slow" -n 2 --dist loadgroup \
		--no-loadscope-reorder

test-slow: install
	$(BIN)/python -m pytest -q -m slow

test-peft: install
	$(BIN)/python tests/peft_suite.py

check: lint test

bench: install
	$(BIN)/python -m benchmarks.train_step --shape 29m --batch 4 --out work/bench/29m
	$(BIN)/python -m benchmarks.train_step --shape 7b-block --batch 1 --length 1024 --repeats 9 \
		--out work/bench/7b-block
	$(BIN)/python -m benchmarks.score --shape 7b-block --out work/bench/score
	$(BIN)/python -m benchmarks.utilisation --out work/bench/utilisation

clean:
	if [ -x $(BIN)/neft ]; then $(BIN)/neft down; fi
	rm -rf work reports .neft mlflow.db mlruns dvc_plots
