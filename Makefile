# Needs Python 3.10 or newer, and nothing else: everything is installed into .venv. Another Python: make PYTHON=python3.12 demo

VENV := .venv
RUN := $(VENV)/bin/python
WORKERS ?= 2
# One thread for each worker: two pytest workers on two cores would otherwise start a pool of threads each.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: help demo test lint docs clean
.DELETE_ON_ERROR:
export PYTHON

help:
	@echo "make demo   install, explain a sentence with the bundled model: out/demo.png, out/demo.html"
	@echo "make test   install with the test tools, run all tests"
	@echo "make lint   ruff, ruff format, import-linter, pyright"
	@echo "make docs   build the documentation into site/"
	@echo "make clean  remove .venv and everything built"

demo: $(VENV)/.has-run
	@echo "lxt: the bundled model explains a sentence (examples/demo.py)"
	@$(RUN) examples/demo.py

test: $(VENV)/.has-test
	@echo "lxt: running all tests in $(WORKERS) processes"
	@$(TEST_ENV) $(RUN) -m pytest -n $(WORKERS)

lint: $(VENV)/.has-dev
	@echo "lxt: ruff check"
	@$(RUN) -m ruff check .
	@echo "lxt: ruff format --check"
	@$(RUN) -m ruff format --check .
	@echo "lxt: lint-imports"
	@$(VENV)/bin/lint-imports
	@echo "lxt: pyright"
	@$(RUN) -m pyright

docs: $(VENV)/.has-docs
	@NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict
	@echo "lxt: wrote site/index.html"

# One stamp per extra (pyproject.toml); a change of the dependencies or the pins installs again.
$(VENV)/.has-%: pyproject.toml constraints.txt
	@GOAL="$(MAKECMDGOALS)" .ci/venv $*
	@touch $@

clean:
	rm -rf $(VENV) out build dist site *.egg-info .pytest_cache .ruff_cache .import_linter_cache
