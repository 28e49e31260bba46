# Needs Python 3.10 or newer, and nothing else: everything is installed into .venv. Another Python: make PYTHON=python3.12 demo

VENV := .venv
RUN := $(VENV)/bin/python
WORKERS ?= 2
# One thread for each worker: two pytest workers on two cores would otherwise start a pool of threads each.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

.PHONY: help demo test lint docs coverage bench nightly clean
.DELETE_ON_ERROR:
export PYTHON

help:
	@echo "make demo   install, explain a sentence with the bundled model: out/demo.png, out/demo.html"
	@echo "make test   install with the test tools, run all tests"
	@echo "make lint   ruff, ruff format, import-linter, pyright"
	@echo "make docs   build the documentation into site/"
	@echo "make coverage  prove every architecture of transformers again, into docs/architectures.md and .json"
	@echo "make bench  time and memory on the CPU against the plain model and other packages, into docs/benchmarks.md and .json"
	@echo "make nightly  what the newest torch and transformers break (PRE=1: pre-releases), in .venv-nightly"
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

# Goes on where it was cut off; FRESH=--fresh starts over, as after a change of the rules.
coverage: $(VENV)/.has-coverage
	@$(TEST_ENV) $(RUN) -m lxt coverage --workers $(WORKERS) --report docs/architectures.md $(FRESH)

# Under 10 minutes on two cores, of which it uses one; other work on the machine moves the figures. ARGS="--sections saved"
bench: $(VENV)/.has-bench
	@OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(RUN) tests/bench/cpu.py --report docs/benchmarks.md $(ARGS)

# Needs a Python and nothing of .venv, which is only read: .ci/nightly says how it works and what it can be told.
nightly:
	@PRE="$(PRE)" TORCH="$(TORCH)" TRANSFORMERS="$(TRANSFORMERS)" PIP_OPTIONS="$(PIP_OPTIONS)" FRESH="$(FRESH)" \
		$(or $(PYTHON),python3) .ci/nightly

# One stamp per extra (pyproject.toml); a change of the dependencies or the pins installs again.
$(VENV)/.has-%: pyproject.toml constraints.txt
	@GOAL="$(MAKECMDGOALS)" .ci/venv $*
	@touch $@

clean:
	rm -rf $(VENV) .venv-nightly out build dist site *.egg-info .pytest_cache .ruff_cache .import_linter_cache
