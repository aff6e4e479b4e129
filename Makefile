# make demo: the whole way on built-in data · make test: lint and tests · make env: the environment alone
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= demo

.PHONY: env demo lint test test-real recipe-real bench

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

# make test-real REAL=FOLDER: FOLDER is an FSD50K of real recordings, or a part of one
test-real: env
	REAL="$(REAL)" $(BIN)/python -m pytest -m real -s

# make recipe-real REAL=FOLDER [OUT=FOLDER]: packs it, and goes PSLA's whole way on it; about half an hour on two cores
OUT ?= runs/real
recipe-real: env
	@test -d "$(REAL)" || { echo "make recipe-real: REAL=\"$(REAL)\" is no folder; give an FSD50K of real recordings"; exit 2; }
	$(BIN)/psla-fast pack fsd50k "$(REAL)" "$(OUT)/shards"
	$(BIN)/psla-fast recipe "$(OUT)/shards" "$(OUT)" --recipe small_cpu --baseline

bench: env
	$(BIN)/python benchmarks/pack.py
	$(BIN)/python benchmarks/stream.py
	$(BIN)/python benchmarks/step.py
	$(BIN)/python benchmarks/end_to_end.py
	$(BIN)/python benchmarks/metrics.py
