# make quickstart   trains on real digits, nothing needed but Python 3.11, 3.12 or 3.13
# make test         lint, types and tests; XLA_FLAGS=--xla_cpu_max_isa=AVX2 make test: as on a
#                   processor with that instruction set
# make test-slow    the tests that take minutes each
# make test-chaos   breaks real runs: kills, full disks, lost processes (about an hour)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-slow test-chaos lint

quickstart: .venv/installed
	$(BIN)/python main.py

test: lint
	$(BIN)/python -m pytest

test-slow: .venv/installed-test
	$(BIN)/python -m pytest -m slow

test-chaos: .venv/installed-test
	$(BIN)/python -m pytest -n 0 -m "slow or not slow" tests/chaos/test_chaos.py \
	  tests/tools/test_launch.py tests/checkpoints/test_storage.py tests/run/test_faults.py
	$(BIN)/python -m pytest -n 0 -m slow tests/run/test_loop.py tests/evaluation/test_evaluation.py

lint: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "Error: $(PYTHON) is $$($(PYTHON) --version 2>&1), and 3.11, 3.12 and 3.13 are" \
	    "supported; give one of them: make PYTHON=python3.13" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --requirement requirements.txt
	@touch $@

.venv/installed-test: .venv/installed requirements-prepare.txt requirements-test.txt
	$(BIN)/python -m pip install --quiet --no-compile --requirement requirements-test.txt
	@touch $@
