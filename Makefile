# Needs make and Python 3.10 or newer, nothing else: the environment is built from pyproject.toml.
# With uv on PATH it is built by uv, otherwise by venv and pip.

PYTHON ?= python3
VENV := .venv

# A name like python3 may mean another interpreter tomorrow (pyenv, an activated environment), so
# the stamp bears the version and the environment is built by the interpreter itself, not the name.
INTERPRETER := $(shell $(PYTHON) -c 'import sys; print(getattr(sys, "_base_executable", "") or sys.executable)' 2>/dev/null)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
READY := $(VENV)/.ready-$(VERSION)
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test bench compat others clean

help:
	@echo "make demo     run the demo: every pattern and anti-pattern, with its findings"
	@echo "make test     ruff, mypy and pytest"
	@echo "make bench    what watching costs"
	@echo "make compat   the tests against the oldest and newest versions of what we depend on"
	@echo "make others   SQLAlchemy's own suites with the pytest plugin and without"
	@echo "make clean    remove the environment and what the tools left"
	@echo
	@echo "PYTHON=python3.12 chooses the interpreter (now $(or $(VERSION),none found) as $(PYTHON))."

demo: $(READY)
	$(BIN)/session-watch demo

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

bench: $(READY)
	$(BIN)/python -m benchmarks

compat: $(READY)
	$(BIN)/python tests/compat/run.py

others: $(READY)
	$(BIN)/python tests/others/run.py

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache dist

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit(1)' 2>/dev/null || { \
		echo "$(PYTHON) is $(if $(VERSION),Python $(VERSION) ($(INTERPRETER)),not a Python that runs here); session-watch needs 3.10 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
		exit 1; }
	@echo "Building $(VENV) with Python $(VERSION)"
	@rm -rf $(VENV)
	@if command -v uv >/dev/null; then \
		uv venv --quiet --python "$(INTERPRETER)" $(VENV) && \
		uv pip install --quiet --python $(BIN)/python --editable '.[dev]'; \
	else \
		"$(INTERPRETER)" -m venv $(VENV) && \
		PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --editable '.[dev]'; \
	fi
	@touch $@
