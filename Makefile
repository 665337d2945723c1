# `make help` lists the targets. Set-up happens by itself, once, into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Nothing that we run phones home, looks for updates, or downloads a model.
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_DISABLE_TELEMETRY := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test check protos protos-current format format-check lint types contracts docs bench experiments lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make .venv and install the locked requirements

$(STAMP): requirements/lock.txt requirements/bases.txt pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 12) else "AirPEFT needs Python 3.11 or 3.12, and this is %d.%d: install one, then run make PYTHON=python3.11 ..." % v)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the locked requirements into $(VENV) (once; a few minutes) ..."
	@$(BIN)/pip install --quiet --requirement requirements/lock.txt
	@$(BIN)/pip install --quiet --no-deps --requirement requirements/bases.txt
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

demo: $(STAMP)  ## run the main job: train, sign, broadcast, verify, swap, measure, roll back
	@$(BIN)/airpeft demo $(ARGS)

test: $(STAMP)  ## run the tests (ARGS="-k name" to choose)
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

check: $(STAMP) format-check lint types contracts protos-current  ## all that CI runs: checks, then the tests
	@$(MAKE) --no-print-directory test

format: $(STAMP)  ## format the code
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix --quiet . || true

format-check: $(STAMP)
	@$(BIN)/ruff format --check .

lint: $(STAMP)  ## lint
	@$(BIN)/ruff check .

types: $(STAMP)  ## check types (mypy, strict)
	@$(BIN)/mypy

contracts: $(STAMP)  ## check that every package imports only what lies below it
	@$(BIN)/lint-imports --no-cache

protos: $(STAMP)  ## generate protos/generated from protos/fleet.proto
	@$(BIN)/python -m grpc_tools.protoc -Iprotos/generated=protos --python_out=. --pyi_out=. \
		--grpc_python_out=. protos/generated/fleet.proto

protos-current: $(STAMP)  ## check that the generated code is current
	@folder=$$(mktemp -d) && $(BIN)/python -m grpc_tools.protoc -Iprotos/generated=protos \
		--python_out=$$folder --pyi_out=$$folder --grpc_python_out=$$folder protos/generated/fleet.proto \
		&& for f in $$(ls $$folder/protos/generated); do \
			cmp -s $$folder/protos/generated/$$f protos/generated/$$f \
			|| { echo "protos/generated/$$f is not current: run make protos"; exit 1; }; done; \
		status=$$?; rm -r $$folder; exit $$status

docs: $(STAMP)  ## check that every command and link in README and docs exists
	@$(BIN)/python -m pytest tests/test_docs.py -q

EXPERIMENTS := benchmarks/recipes.py benchmarks/private_accuracy.py

$(VENV)/.bench: $(STAMP) requirements/bench.txt
	@$(BIN)/pip install --quiet --no-deps --requirement requirements/bench.txt
	@touch $@

bench: $(VENV)/.bench  ## print the benchmarks, as ratios against a baseline of the same run
	@for f in $(filter-out $(EXPERIMENTS),$(wildcard benchmarks/[a-z]*.py)); do echo "== $$f"; $(BIN)/python $$f || exit 1; done

experiments: $(STAMP)  ## train what the tables of the docs show (about an hour on two cores)
	@for f in $(EXPERIMENTS); do echo "== $$f"; $(BIN)/python $$f || exit 1; done

lock:  ## resolve the requirements anew and write requirements/lock.txt
	@folder=$$(mktemp -d) && $(PYTHON) -m venv $$folder \
		&& $$folder/bin/pip install --quiet 'torch==2.13.0' \
		&& $$folder/bin/pip install --quiet --editable '.[ray,postgres]' --requirement requirements/dev.in setuptools \
		&& { echo "# Written by make lock: pyproject.toml and requirements/dev.in, resolved."; \
			 $$folder/bin/pip freeze --all --exclude-editable | grep -vE '^(pip)==' | sed 's/+cpu$$//'; } > requirements/lock.txt; \
		status=$$?; rm -rf $$folder; exit $$status

clean:  ## remove what was built, the environment included
	@rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache runs
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
