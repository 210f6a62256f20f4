# Two commands do all the set-up: `make quickstart` runs the whole job, `make test` checks everything.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
# Constraints hold in isolated builds too (pip 25.3 renamed the variable for those).
PIP    := PIP_CONSTRAINT=$(CURDIR)/tools/constraints.txt PIP_BUILD_CONSTRAINT=$(CURDIR)/tools/constraints.txt \
          PIP_DISABLE_PIP_VERSION_CHECK=1 $(PY) -m pip install --quiet
SOURCES := setup.py pyproject.toml tools/constraints.txt $(wildcard csrc/cpp/* csrc/cuda/*)

.PHONY: quickstart test lint clean

quickstart: $(VENV)/.installed  ## run the full pipeline on this machine, from its sources to a model that fills in; ARGS="--minutes 3"
	$(PY) -m megacoder quickstart $(ARGS)

test: lint  ## lint, types and all tests; PYTEST="-k fim" narrows
	$(PY) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(PYTEST)

lint: $(VENV)/.installed-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "megacoder: needs Python 3.11 or newer; $(PYTHON) is older or does not run; try: make PYTHON=python3.12 quickstart"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "megacoder: $(PYTHON) cannot make a virtual environment; on Debian: apt-get install python3-venv"; exit 1; }

$(VENV)/.installed: $(VENV)/bin/python $(SOURCES)
	$(PIP) --editable '.[hf]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) --editable '.[test]'
	@touch $@

clean:  ## remove the environment and build outputs; keeps runs
	rm -rf $(VENV) build *.egg-info megacoder/*.so
