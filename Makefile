# Every target sets itself up. `check` edits nothing.
VENV ?= venv
export VENV CONSTRAINTS
BIN = $(VENV)/bin
# The models of the tests are too small to gain from threads.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest
CODE = train.py debug_gpu.py configs utils benchmarks scripts cloud tests

.PHONY: setup format check-format lint types test check check-all check-oldest bench soak

setup:
	@bash setup.sh --dev

format: setup
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix $(CODE)

check-format: setup
	$(BIN)/ruff format --check $(CODE)

lint: setup
	$(BIN)/ruff check $(CODE)
	$(BIN)/lint-imports --no-cache

types: setup
	$(BIN)/mypy

test: setup
	$(PYTEST) -n 3 --dist loadfile -m "not slow and not gpu and not gsutil and not browser"

check: check-format lint types test

check-all: check-format lint types
	$(PYTEST)

# The tests again, with the lowest versions that requirements.txt allows, in an environment of their own.
check-oldest:
	@$(MAKE) VENV=venv-oldest CONSTRAINTS=constraints-oldest.txt test

bench: setup
	$(BIN)/python scripts/benchmark.py

# Hundreds of kills and resumes, of uploads, of tasks of a preparation; SOAK="--quick" for a dozen, --help for more.
soak: setup
	$(BIN)/python tests/campaigns/soak.py $(SOAK)
	$(BIN)/python tests/campaigns/soak_uploads.py $(SOAK)
	$(BIN)/python tests/campaigns/soak_tasks.py $(SOAK)
