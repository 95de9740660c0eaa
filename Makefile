# demo and test make their own virtual environment; nothing else needs to be installed first
# but Python 3.11+, its headers and g++.
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := torch,export,cpu,dev

.PHONY: demo test check bench clean

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	touch $@

demo: .venv/.installed
	$(BIN)/llamac generate --prompt "Once upon a time"

test: .venv/.installed
	$(BIN)/python -m pytest

check: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

bench: .venv/.installed
	$(BIN)/llamac bench

clean:
	rm -rf .venv build dist *.egg-info
