# make demo and make test set up everything they need on a machine with Python >= 3.10 and nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
SITE_READY := $(VENV)/.site-ready
SHELL  := /bin/bash

.PHONY: demo test test-slow faults bench docs check lint types setup lock clean

demo: $(READY)  ## the whole job on embedded data, in minutes
	$(BIN)/p3b demo

# What pytest makes of the test files is kept for the next run, also where the environment asks Python to keep nothing.
test test-slow: export PYTHONDONTWRITEBYTECODE =

test: $(READY)  ## the default tests: every law, each kind of model and setting at least once
	$(BIN)/python -m pytest -n auto --dist worksteal

test-slow: $(READY)  ## what the default tests leave out: the other pairs of long products, exports of every family
	$(BIN)/python -m pytest -n auto --dist worksteal -m slow

faults: $(READY)  ## laws, damaged files, killed runs and other numbers of processes in large numbers: a quarter of an hour (docs/reliability.md)
	$(BIN)/python benchmarks/faults/campaign.py run
	$(BIN)/python benchmarks/faults/campaign.py table

bench: $(READY)  ## what pruning costs beside plain training, side by side (docs/performance.md)
	$(BIN)/python benchmarks/bench.py run

docs: $(READY) $(SITE_READY)  ## the documentation as a site, in site/; built without network
	$(BIN)/python scripts/site/reference_pages.py
	PYTHONPATH=scripts/site $(BIN)/zensical build --clean --strict
	$(BIN)/python scripts/site/check_site.py site

check: lint types test  ## what CI runs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

setup: $(READY)

# The exact, tested versions of requirements.lock; .ready says that this lock and this pyproject are what is installed.
$(READY): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "P3B needs Python 3.10 or newer; give one with make PYTHON=python3.12 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[demo,onnx,serve,dev]'
	touch $@

# What builds the site is installed only for that.
$(SITE_READY): $(READY)
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "The site needs Python 3.11 or newer; the pages of docs/ can be read as they are." >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[docs]'
	touch $@

lock:  ## resolve requirements.lock anew, for every Python that is supported; trackers stay open: they would pin Pillow back
	$(PYTHON) -m venv .make/lock && .make/lock/bin/pip install --quiet uv
	.make/lock/bin/uv pip compile --quiet --universal --python-version 3.10 --no-emit-index-url --no-annotate \
	  --extra demo --extra onnx --extra serve --extra docs --extra dev \
	  --custom-compile-command "make lock" --output-file requirements.lock pyproject.toml

clean:
	rm -rf .make build dist site .cache *.egg-info src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-run
