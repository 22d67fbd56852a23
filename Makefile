# Every target sets up what it needs: a virtual environment with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
TESTS := $(BIN)/python -m pytest -n auto --dist loadfile  # a process for each core; a file is run by one of them
QUICKLY := $(if $(QUICK),--quick --results .bench/quick)

.PHONY: train test check audit fuzz soak bench bench-gpu golden clean

train: .venv/ready  ## train a small model in about ten minutes, test it and let it write
	$(BIN)/memorizing-transformers train

test: check  ## everything that must hold, on all cores
	$(TESTS)

check: .venv/ready  ## lint, format, types, sizes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_sizes.py

audit: .venv/ready .venv/audit  ## known vulnerabilities of what is installed; risky code in the package
	$(BIN)/ruff check memorizing_transformers_pytorch
	$(BIN)/python -m pytest -q tests/test_audit.py
	$(BIN)/python scripts/audit_dependencies.py

fuzz: .venv/ready  ## read many malformed files; INPUTS=1000000 SEED=1 for more and others
	$(BIN)/python -m tests.fuzz --inputs $(or $(INPUTS),100000) --seed $(or $(SEED),0)

bench: .venv/ready  ## measure what a memory costs and write docs/performance.md; QUICK=1 for some minutes
	$(BIN)/python -m benchmarks $(QUICKLY)

bench-gpu: .venv/ready  ## the same on a GPU
	$(BIN)/python -m benchmarks --device cuda $(QUICKLY)

soak: .venv/ready  ## many more examples of what `make test` tries; memories against plain lists, a million operations
	SOAK=1 $(TESTS) -m "soak or hypothesis"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak

golden: .venv/ready  ## make tests/golden anew, by running the original package in an environment of its own
	scripts/make_golden.sh

.venv/ready: pyproject.toml constraints.txt
	@echo "setting up .venv (some minutes, for torch)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]' --group dev
	touch $@

.venv/audit: .venv/ready
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --group audit 2>/dev/null && touch $@ || true

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
