# `make` lists what there is to do. Each target makes what it needs in .venv, once; nothing else is touched.
# `make clean` and a new PYTHON=... change the Python that .venv is made with.

# The first Python here that is 3.10 to 3.13 and can make a virtual environment. Each is tried, not just looked up:
# a version manager may leave names on the path that do not run.
CAN_MAKE_VENV = import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3.10 python3; do \
	if "$$python" -c '$(CAN_MAKE_VENV)' >/dev/null 2>&1; then echo "$$python"; break; fi; done)

CODE = beam_envelope pipelines tests benchmarks
BIN = .venv/bin
PIP_INSTALL = PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test spark engines test-engines engines-matrix lint format types bench ci clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: .venv/.stamp-base ## see it at work on a real dataset; no AWS account needed
	@$(BIN)/python -m pipelines.demo

test: .venv/.stamp-test ## run the tests; PYTEST_ARGS="-k shard -x" passes options on
	$(BIN)/python -m pytest --numprocesses auto $(PYTEST_ARGS)

# Maven fetches the AWS SDK for Java into its own folder; without it, the tests of docs/spark/ are skipped.
spark: .venv/.stamp-spark ## have `make test` let Spark and Tink read what we write; needs Java 17 with javac
	@if command -v mvn >/dev/null; then \
		mvn --quiet --batch-mode --file tests/formats/spark/pom.xml dependency:build-classpath >/dev/null \
		|| echo "Maven could not fetch the AWS SDK for Java: the tests of docs/spark/ will be skipped."; \
	else echo "No Maven here: the tests of docs/spark/ will be skipped."; fi

# They are built outside of this folder, once for all clones: tests/engines/build.py says where.
engines: .venv/.stamp-venv ## build Prism, Flink, Spark and more for `make test-engines`; needs Go, Java 17 and Maven
	@$(BIN)/python tests/engines/build.py

# Engines wait a lot, so two processes take turns; all tests of an engine are in one of them, and start it once.
# Behind the tests of the engines come those that `make test` skips where Beam's extras are not installed.
ENGINE_TESTS = tests/engines tests/io/test_options.py tests/pipelines/test_dataflow_graph.py \
	tests/transforms/test_fields_schemas.py
IN_TWO = --numprocesses 2 --dist loadscope --no-loadscope-reorder
test-engines: engines .venv/.stamp-engines ## run our transforms and programs on every engine; some minutes
	$(BIN)/python -m pytest $(ENGINE_TESTS) $(IN_TWO) --timeout 600 $(PYTEST_ARGS)

# A column of the table alone: make engines-matrix PYTEST_ARGS="-k Spark"
engines-matrix: export BEAM_ENVELOPE_MATRIX = build/engines-matrix.json
engines-matrix: ## run them, and write what ran where into docs/runners-matrix.md
	$(MAKE) test-engines ENGINE_TESTS=tests/engines/test_matrix.py
	$(BIN)/python -m tests.engines.matrix $(BEAM_ENVELOPE_MATRIX) docs/runners-matrix.md

lint: .venv/.stamp-lint ## check the code's style and its formatting
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

format: .venv/.stamp-lint ## fix what can be fixed, and format the code
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

types: .venv/.stamp-types ## check the types
	$(BIN)/mypy

bench: .venv/.stamp-bench ## measure against other tools: a table, a JSON file and a chart
	$(BIN)/python -m benchmarks

ci: ## run all that a change must pass
	@.ci/run

clean: ## remove .venv and all that was built
	rm -rf .venv build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/.stamp-venv:
	@python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
		echo "No Python 3.10, 3.11, 3.12 or 3.13 found that can make a virtual environment." >&2; \
		echo "Install one (on Debian and Ubuntu with its python3-venv), or name it: make PYTHON=/path/to/python3.12" >&2; \
		exit 1; \
	fi; \
	if ! "$$python" -c '$(CAN_MAKE_VENV)' >/dev/null 2>&1; then \
		echo "$$python does not run, is not Python 3.10 to 3.13, or lacks venv. Name another: make PYTHON=..." >&2; \
		exit 1; \
	fi; \
	echo "Making .venv with $$("$$python" --version) ..."; \
	"$$python" -m venv --clear .venv
	@touch $@

.venv/.stamp-base: pyproject.toml .venv/.stamp-venv
	@echo "Installing beam-envelope and the libraries it needs (once; a minute or two) ..."
	@$(PIP_INSTALL) --editable .
	@touch $@

# The tools of a target are the extra of the same name in pyproject.toml.
.venv/.stamp-%: pyproject.toml .venv/.stamp-base
	@echo "Installing what 'make $*' needs (once) ..."
	@$(PIP_INSTALL) --editable '.[$*]'
	@touch $@
