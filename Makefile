# Two commands do everything: `make demo` and `make test`. Both make the environment first, once.
PYTHON ?= python3
VENV := .venv/bin

.PHONY: help setup demo test lint format clean

help:
	@echo "make demo    make the environment if needed, then train the tiny policy and show it get better"
	@echo "make test    lint, types and all tests, with the time each group took"
	@echo "make setup   only make the environment: .venv"
	@echo "make lint    ruff and mypy         make format   let ruff rewrite the files"
	@echo "make clean   remove .venv, runs and caches"

setup:
	@$(PYTHON) .ci/setup.py

demo: setup
	@$(VENV)/gumshoe train configs/demo.yaml

test: setup
	@$(VENV)/python tests/run.py

lint: setup
	@$(VENV)/python tests/run.py lint types

format: setup
	@$(VENV)/ruff check --fix --quiet . ; $(VENV)/ruff format .

clean:
	rm -rf .venv runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
