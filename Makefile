# make train   set up and train the small model on real text with 2 workers (ARGS="key=value ..." overrides)
# make test    set up and run the tests, coverage printed
# make lint    ruff, type checker, import contracts
# make bench   the benchmarks, each with its bars
# make soak    the full fault campaigns (long)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=

.PHONY: train test lint format bench soak clean

train: $(STAMP)
	$(BIN)/windlass train +experiment=first_run $(ARGS)

test: $(STAMP) lint
	rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest -q --durations=10 $(ARGS)
	-$(BIN)/coverage combine -q --append # processes that a test killed leave torn files: those are passed over
	$(BIN)/coverage report --fail-under=85

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)
	for file in benchmarks/[a-z]*.py; do $(BIN)/python $$file $(ARGS) || exit 1; done

soak: $(STAMP)
	$(BIN)/python -m pytest -q -s -m soak $(ARGS)

clean:
	rm -rf $(VENV) build dist .coverage .coverage.* .pytest_cache .ruff_cache

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "windlass needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all,dev]"
	touch $@
