# Two commands do everything: `make demo` and `make test`. Both make the environment first, once.
PYTHON ?= python3
VENV := .venv/bin

.PHONY: help setup demo test lint format gpu-check clean

help:
	@echo "make demo    make the environment if needed, then train the tiny policy and show it get better"
	@echo "make test    lint, types and all tests, with the time each group took"
	@echo "make gpu-check   what a GPU is needed for, checked on the one that is here; OUT=FILE for the JSON"
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

# Needs no environment: on a bare image with torch the checks that can run do, and the others say what they lack.
gpu-check:
	@$(if $(wildcard $(VENV)/python),$(VENV)/python,$(PYTHON)) -m cluster.gpu_check --out $(or $(OUT),runs/gpu_check.json)

clean:
	rm -rf .venv runs .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
