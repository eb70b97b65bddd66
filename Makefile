# The two main commands are `make demo` and `make test`. Each sets up what it needs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

.PHONY: venv demo test lint docs parity parity-all fuzz bench bench-full lock clean
venv: $(VENV)/.done

# --no-deps: the lock is complete, so pip does not need to resolve anything.
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
	@echo "branch coverage, without the subprocesses of tests: $$($(BIN)/coverage report --format=total) %"

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The documentation site, in build/site; needs no network. `.venv/bin/mkdocs serve` shows it while you write.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "the site is in build/site: python3 -m http.server -d build/site"

# Compares with the real MaxText, in its own Python 3.12 environment: the comparisons that a change can break.
parity: venv
	bash tests/parity/run.sh -m core

# All comparisons, including long tables of cases. README.md and `ferry models` show the results.
parity-all: venv
	bash tests/parity/run.sh

# A million damaged and hostile inputs. `make test` runs a short round.
fuzz: venv
	$(BIN)/python -m tests.fuzz $(FUZZ)

# What a conversion costs, compared with the minimum and with MaxText (if `make parity` has installed it).
bench: venv
	$(BIN)/python -m tests.benchmarks.bench

# DeepSeek-V3 671B at full size, with zeros as weights: half an hour.
bench-full: venv
	$(BIN)/python -m tests.benchmarks.full

# Resolves pyproject's dependencies again. torch is pinned, since any other version depends on CUDA.
lock:
	rm -rf build/lock && $(PYTHON) -m venv build/lock
	build/lock/bin/pip install -q torch==2.13.0 setuptools '.[check,airflow,kubernetes,dev,docs]'
	build/lock/bin/pip freeze --all --exclude pip --exclude ferry-checkpoints | sed 's/^torch==.*/torch==2.13.0/' > deploy/requirements.lock
	rm -rf build/lock

clean:
	rm -rf $(VENV) .parity .demo build
