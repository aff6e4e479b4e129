# make demo: the whole way on built-in data · make test: lint and tests · make env: the environment alone
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= demo

.PHONY: env demo lint test test-real bench

env:
	@$(PYTHON) tools/make_env.py

demo: env
	$(BIN)/psla-fast demo $(DEMO)

lint: env
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -m "not real"

# REAL is a small FSD50K of real recordings (README, "Real recordings")
test-real: env
	$(BIN)/python -m pytest -m real

bench: env
	$(BIN)/python benchmarks/stream.py
	$(BIN)/python benchmarks/step.py
