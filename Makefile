# make search: install into .venv and run the main job on the embedded digits.
# make test:   install into .venv and run the quick tests, among them one run through all stages; under four minutes.
# make check:  the whole gate, exactly as CI runs it: lint, types, import contracts and all tests but the long; ten minutes.
# make docs:   docs/spec.md and the schema, anew from the code.
# make long:   the tests that take the gate beyond ten minutes.
# make bench-step, bench-search, bench-fused: the training step, the search and fused trials against plain references;
#              QUICK=1 for the short form, DATA=DIR for the MNIST that lies there.
# make chaos:  30 small runs, each killed at random moments and taken up again; about 40 minutes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: install search test check docs long chaos lint types contracts constraints clean bench-step bench-search bench-fused

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[export,dev]"
	touch $@

search: install
	$(BIN)/python -m tuner.search

test: install
	$(BIN)/python -m pytest

check: lint types contracts
	$(BIN)/python -m pytest -m "not long"

docs: install
	$(BIN)/python docs/spec_reference.py > docs/spec.md
	$(BIN)/python -m tuner.spec --schema > search_spaces/schema.json

long: install
	$(BIN)/python -m pytest -m long -n0

chaos: install
	$(BIN)/python -m benchmarks.chaos --rounds 30 --seed 0

bench-step bench-search bench-fused: bench-%: install
	$(BIN)/python -m benchmarks.$* $(if $(QUICK),--quick) $(if $(DATA),--data-dir $(DATA))

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

contracts: install
	$(BIN)/lint-imports

constraints: install
	$(BIN)/pip freeze --all --exclude-editable --exclude pip | sed 's/+cpu//' > constraints.txt

clean:
	rm -rf .venv runs
