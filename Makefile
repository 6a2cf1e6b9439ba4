# Two commands are enough: make quickstart, make test. Each works alone on a fresh machine with Python 3.11 or newer.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-oldest test-newest hostile families mutants faults memory-faults proofs check format bench clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

install: $(READY) ## virtual environment with pinned dependencies and whet in editable mode

$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "whet needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	@echo "setting up $(VENV) (once; a few minutes, most of it PyTorch)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

quickstart: $(READY) ## learn, score, merge and show, on the built-in model and data
	@$(BIN)/whet quickstart

test: $(READY) ## the CPU tests, about 12 minutes on 2 quiet cores, no network
	@$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-oldest: ## the tests with the lowest versions that pyproject.toml admits, in an environment of their own
	@$(PYTHON) tests/ranges.py oldest

test-newest: ## the same with the highest
	@$(PYTHON) tests/ranges.py newest

families: $(READY) ## every text family of transformers, trained, answered and merged against plain transformers (10 minutes)
	@$(BIN)/python tests/families/run.py --jobs 2

hostile: $(READY) ## hostile recipes, rows, templates and terminals: each is refused clearly or means what it says
	@$(BIN)/python -m pytest tests/hostile tests/test_template_refusals.py -q

mutants: $(READY) ## careless edits planted one at a time: every one must turn a test red (an hour)
	@$(BIN)/python tests/mutants/run.py

faults: $(READY) ## every file operation of every command that writes fails once, where it can be met, in five ways (two hours; needs gcc)
	@$(BIN)/python tests/faults/proof.py

memory-faults: $(READY) ## memory runs out at allocations of every phase of every command (25 minutes; CASES=all: days)
	@$(BIN)/python tests/out_of_memory/proof.py

proofs: $(READY) ## the many cases of which make test runs a few: kills at every moment, every storage, step and template
	@$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m proof

check: $(READY) ## lint, types, import contract, no patching, budgets: under a minute
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-cache
	@$(BIN)/python -m pytest tests/architecture -q
	@$(BIN)/basedpyright --level error

format: $(READY) ## put the code into its usual form
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(READY) ## speed on this machine against TRL and PEFT
	@$(BIN)/python bench/cpu.py

clean: ## remove the environment and caches; runs/ stays
	@rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest .pytest_cache .ruff_cache
