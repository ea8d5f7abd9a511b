# Every target sets up .venv from requirements.lock first, and only when that or pyproject.toml has changed.
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin

# Commands and DVC find `lora-pipe` and `python` here; nothing is ever fetched from the Hugging Face hub.
export PATH := $(BIN):$(PATH)
export HF_HUB_OFFLINE := 1

.PHONY: repro test lint bench ui clean

repro: .venv/.installed
	$(BIN)/dvc repro

test: .venv/.installed
	$(BIN)/python -m pytest --hypothesis-profile=thorough

lint: .venv/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.installed
	@if [ -d benchmarks ]; then $(BIN)/python -m benchmarks.adapters; else echo "no benchmarks/ here"; fi

ui: .venv/.installed
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db

# Leaves what `repro` made, and the checkpoints in .work that a stopped run goes on from.
clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis *.egg-info

.venv/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --requirement requirements.lock
	$(BIN)/python -m pip install --no-deps --editable .
	touch $@
