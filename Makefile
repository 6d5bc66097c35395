# Every target sets up its own environment in .venv first. Another interpreter: make test PYTHON=python3.13 VENV=.venv313
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SEED ?= 0
.DEFAULT_GOAL := help
.PHONY: help quickstart test parity lint bench slow clean-venv

help:
	@echo "make quickstart   build a small aligned model, attack it, defend it, report (SEED=0)"
	@echo "make test         the test suite, without torch (under 10 minutes on 2 cores)"
	@echo "make parity       live comparison with torch, transformers and PEFT"
	@echo "make lint         ruff check and format check"
	@echo "make bench        timings against transformers and PEFT, printed as ratios"
	@echo "make slow         the tests that need large inputs or many minutes"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The stamp is written last, so an interrupted installation is taken up again.
$(VENV)/.ready: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet -e ".[test]"
	@touch $@

# torch comes first and alone, pinned: what follows then finds it there and does not fetch a larger build.
$(VENV)/.ready-parity: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e ".[test,parity]"
	@touch $@

quickstart: $(VENV)/.ready
	$(BIN)/safemoe quickstart --seed $(SEED)

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not parity"

parity: $(VENV)/.ready-parity
	$(BIN)/python -m pytest -n auto --dist loadfile -m "parity and not slow"

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.ready-parity
	$(BIN)/python experiments/bench.py

slow: $(VENV)/.ready-parity
	$(BIN)/python -m pytest -m slow

clean-venv:
	rm -rf $(VENV)
