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
NEIGHBOURS := .neighbours
NEIGHBOURS_READY := $(NEIGHBOURS)/.ready-$(VERSION)

.DEFAULT_GOAL := help
.PHONY: help demo test workers model faults soak scale alerts page bench bench-peers bench-suite matrix neighbours others guides clean

help:
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "PYTHON=python3.12 chooses the interpreter (now $(or $(VERSION),none found) as $(PYTHON))."

demo: $(READY) ## run the demo: every pattern and anti-pattern, with its findings
	$(BIN)/session-watch demo

# The tests start some hundred interpreters, each of which would compile the package again.
test: export PYTHONDONTWRITEBYTECODE =
test: $(READY) ## ruff, mypy and pytest
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --dist loadfile

workers: $(READY) ## what takes several workers: totals of ten thousand requests, a suite on four
	$(BIN)/pytest -m workers -s

model: $(READY) ## thousands of random session lives next to an oracle: some minutes
	$(BIN)/pytest -m model tests/model

faults: $(READY) ## terminated, restarted, cut off, exhausted, full, killed: with the watch as without; some minutes
	$(BIN)/pytest -m faults -s tests/faults

soak: $(READY) ## a million requests, one in a hundred at fault: counts exact, memory flat; a quarter of an hour
	$(BIN)/python -m benchmarks.soak

scale: $(READY) ## what a request, a sweep and a scrape cost while ten thousand works are open
	$(BIN)/python -m benchmarks.scale --svg docs/images/scale.svg

alerts: $(READY) ## alert rules and dashboards in a real Prometheus and Alertmanager: some minutes
	$(BIN)/pytest -m alerts tests/alerting

page: $(READY) ## the slow tests of the live page in a real Chromium, with what they measure
	$(BIN)/pytest -m page -s tests/test_page_in_browser.py

bench: $(READY) ## what watching costs
	$(BIN)/python -m benchmarks

bench-suite: $(READY) ## what the pytest plugin costs three suites of 1,000 tests: half an hour
	$(BIN)/python -m benchmarks.suite

bench-peers: $(READY) ## what watching costs beside what its peers cost, with a chart: an hour or so
	$(BIN)/python -m benchmarks.peers --docs

matrix: $(READY) ## the tests under old and new Python, SQLAlchemy and FastAPI: an hour or more, writes docs/versions.md
	$(BIN)/python -m tests.matrix --fresh --write

# ddtrace brings a pytest plugin of its own, which has no business here.
neighbours: $(NEIGHBOURS_READY) ## the tests beside OpenTelemetry's, Sentry's and Datadog's instrumentation
	NEIGHBOURS=all $(NEIGHBOURS)/bin/pytest -p no:ddtrace tests/test_neighbours.py

others: $(READY) ## SQLAlchemy's, Starlette's and FastAPI's own suites, with us and without: an hour or so
	$(BIN)/python -m tests.others.run $(SUITES)

guides: $(READY) ## the guides, each as a program of its own
	$(BIN)/pytest tests/test_guides.py

clean: ## remove the environments and what the tools left
	rm -rf $(VENV) $(NEIGHBOURS) .peers .matrix .others .mypy_cache .pytest_cache .ruff_cache dist

$(READY): EXTRA := dev
$(NEIGHBOURS_READY): EXTRA := neighbours
$(READY) $(NEIGHBOURS_READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit(1)' 2>/dev/null || { \
		echo "$(PYTHON) is $(if $(VERSION),Python $(VERSION) ($(INTERPRETER)),not a Python that runs here); session-watch needs 3.10 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
		exit 1; }
	@echo "Building $(@D) with Python $(VERSION)"
	@rm -rf $(@D)
	@if command -v uv >/dev/null; then \
		uv venv --quiet --python "$(INTERPRETER)" $(@D) && \
		uv pip install --quiet --python $(@D)/bin/python --editable '.[$(EXTRA)]'; \
	else \
		"$(INTERPRETER)" -m venv $(@D) && \
		PIP_DISABLE_PIP_VERSION_CHECK=1 $(@D)/bin/python -m pip install --quiet --editable '.[$(EXTRA)]'; \
	fi
	@touch $@
