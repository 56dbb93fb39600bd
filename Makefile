# Everything runs in .venv, which the first target that needs it sets up.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready

# The two ends of the range of transformers that pyproject.toml states, and what is tested at each.
RANGE := 5.20.0 5.23.0
CORE := $(addprefix tests/test_,configuration.py modeling.py processing.py pipeline.py classification.py releases.py editing.py lora.py)

.PHONY: help setup demo test test-all test-range lint format clean

help:
	@echo "make demo      train on a drawn world, compare with baselines, write a Hub folder and a picture"
	@echo "make test      the test suite, without network"
	@echo "make test-all  also what is slow"
	@echo "make test-range  the core of it at both ends of the range of transformers, each in an environment of its own"
	@echo "make lint      ruff"

setup: $(READY)

# The stamp is as old as the environment: a second call does nothing until the pins change.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,demo,audio]'
	touch $@

demo: $(READY)
	$(VENV)/bin/crossmodal demo

test: $(READY)
	$(VENV)/bin/python -m pytest -q -m 'not slow'

test-all: $(READY)
	$(VENV)/bin/python -m pytest -q

# One end alone: make test-range RANGE=5.20.0
test-range: $(addprefix test-transformers-,$(RANGE))

test-transformers-%:
	test -x $(VENV)/range/$*/bin/python || $(PYTHON) -m venv $(VENV)/range/$*
	sed 's/^transformers==.*/transformers==$*/' constraints.txt > $(VENV)/range/$*/constraints.txt
	$(VENV)/range/$*/bin/pip install --quiet --disable-pip-version-check -c $(VENV)/range/$*/constraints.txt -e '.[dev,demo,audio]'
	$(VENV)/range/$*/bin/python -m pytest -q -m 'not slow' $(CORE)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) outputs build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .cache
