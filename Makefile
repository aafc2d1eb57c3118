# make demo    train on MNIST under DP, sample, evaluate, and say what it came to; minutes on a laptop
# make test    everything that CI checks: lint, import layers, tests
# make lint    ruff and the import layers          make types   mypy
# make test-mutations   break the guarantee on purpose, in a copy, and see a test turn red each time; 6 minutes
# make test-audit       20,000 runs of the private step with and without one image: what they prove about epsilon; 5 minutes
# make test-kill        kill train.py at 21 random moments: each run must go on to the bytes of one that was never killed; 10 minutes
#                       all three take ONLY=REGEX for some rows alone, e.g. make test-mutations ONLY=clip
# make clean   remove the environment and caches, never runs/
#
# The environment is .venv, made of the versions in constraints.txt. Another Python: make PYTHON=python3.12 ...

PYTHON ?= python3
CONFIG ?= configs/mnist/dp_syngen.yaml
RUN ?= runs/demo
ONLY ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq -c constraints.txt

.PHONY: demo test test-mutations test-audit test-kill lint types clean

demo: $(VENV)/.installed
	$(BIN)/python train.py --config $(CONFIG) --run $(RUN)
	$(BIN)/python sample.py --run $(RUN)
	$(BIN)/python evaluate.py --run $(RUN)
	@echo
	@$(BIN)/python -m dpsyngen.summary $(RUN)

test: lint
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile

test-mutations: $(VENV)/.installed-dev
	$(BIN)/python tests/mutate.py --only '$(ONLY)'

test-audit: $(VENV)/.installed-dev
	$(BIN)/python tests/auditing.py --only '$(ONLY)'

test-kill: $(VENV)/.installed-dev
	$(BIN)/python tests/kill.py --only '$(ONLY)'

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/lint-imports

types: $(VENV)/.installed-dev
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: each step is done once, and again when the versions change.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "make: expected Python 3.11 or newer, got $(PYTHON) ($$($(PYTHON) --version 2>&1)); name one with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { echo "make: $(PYTHON) -m venv failed; Debian and Ubuntu need the package python3-venv" >&2; exit 1; }
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	@echo "installing into $(VENV); the first time this takes minutes"
	@$(PIP) torch
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP) -e '.[dev]'
	@touch $@
