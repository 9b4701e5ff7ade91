# make search: install into .venv and run the main job on the embedded digits.
# make test:   install into .venv and run the quick tests, among them one run through all stages; some four minutes.
# make test-3.12, test-3.13, test-3.14: the same under another Python, in an environment of its own.
# make check:  the whole gate, exactly as CI runs it: lint, types, import contracts and all tests but the long.
# make docs:   docs/spec.md and the schema, anew from the code.
# make long:   whole runs that would make the gate half as long again; before a release.
# make bench-step, bench-search, bench-fused: the training step, the search and fused trials against plain references;
#              QUICK=1 for the short form, DATA=DIR for the MNIST that lies there.
# make chaos:  30 small runs, each killed at random moments and taken up again; about 40 minutes.
# wheel:       dist/*.whl, which works alone.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))
PYTHON ?= $(shell for it in python3 python3.14 python3.13 python3.12 python3.11; do \
	if $$it -c "$(FITS)" 2>/dev/null; then echo $$it; break; fi; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --no-compile --disable-pip-version-check --root-user-action=ignore --constraint constraints.txt
# Bytecode is Python's to write, of what is imported: a quarter of all modules.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install search test test-3.12 test-3.13 test-3.14 check all-but-long docs long chaos lint types contracts constraints wheel clean bench-step bench-search bench-fused

install: $(VENV)/installed

$(VENV)/python:
	@test -n "$(PYTHON)" || { echo "error: this takes a Python from 3.11 to 3.14, and none is on the PATH; or name one: make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/runtime: $(VENV)/python pyproject.toml constraints.txt
	$(PIP) --editable .
	touch $@

$(VENV)/installed: $(VENV)/python pyproject.toml constraints.txt
	xargs -n 20 -P 2 $(PIP) --no-deps < constraints.txt || true  # a start on two cores, where pip alone uses one
	$(PIP) --editable ".[dev]"
	touch $(VENV)/runtime $@

search: $(VENV)/runtime
	$(BIN)/python -m tuner.search

wheel: $(VENV)/runtime
	$(BIN)/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

test: install
	$(BIN)/python -m pytest

test-3.12 test-3.13 test-3.14: test-%:
	$(MAKE) test VENV=.venv-$* PYTHON=python$*

check: install
	$(MAKE) --jobs=2 lint types contracts all-but-long

all-but-long: install
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
	rm -rf .venv .venv-3.* runs dist build
