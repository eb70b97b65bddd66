# Two commands matter: `make demo` and `make test`. Each sets up what it needs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: venv demo test lint docs parity parity-all bench bench-full lock clean
venv: $(VENV)/.done

# The lock is complete, so pip need not resolve anything: --no-deps.
$(VENV)/.done: deploy/requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info[:2] == (3, 11), sys.version'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-deps -r deploy/requirements.lock
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

demo: venv
	$(BIN)/ferry demo

test: venv lint
	mkdir -p build
	$(BIN)/pytest -n 2 --no-loadscope-reorder --cov --cov-report=
	@echo "branch coverage, of what ran in the tests' own processes: $$($(BIN)/coverage report --format=total) %"

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation site, in build/site; nothing is fetched. `.venv/bin/mkdocs serve` shows it while it is written.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the site is in build/site: python3 -m http.server -d build/site"

# The real MaxText, in a Python 3.12 environment of its own: what a change can break.
parity: venv
	bash tests/parity/run.sh -m core

# All of it, long tables of cases too; README.md and `ferry models` say what it saw.
parity-all: venv
	bash tests/parity/run.sh

# What a conversion takes, against the least it could take and against MaxText (where `make parity` has made it).
bench: venv
	$(BIN)/python -m tests.benchmarks.bench

# DeepSeek-V3 671B at full size, in zeros: half an hour.
bench-full: venv
	$(BIN)/python -m tests.benchmarks.full

# Resolves pyproject's dependencies anew. torch is named exactly: any other version brings CUDA along.
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install -q torch==2.13.0 setuptools '.[check,airflow,kubernetes,dev,docs]'
	build/lock/bin/pip freeze --all --exclude pip --exclude ferry-checkpoints | sed 's/^torch==.*/torch==2.13.0/' > deploy/requirements.lock
	rm -rf build/lock

clean:
	rm -rf $(VENV) .parity .demo build
