# `make demo` shows it, `make test` proves it. Both make their own .venv first.
PY  ?= python3
BIN := .venv/bin
READY := .venv/.ready
.DEFAULT_GOAL := help

help:      ## list the targets
	@grep -hE '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

# torch goes first and alone, so that the pinned build is the one every other package finds.
$(READY): settings.ini setup.py constraints.txt
	@$(PY) -c 'import sys; sys.exit("okadfa needs Python 3.11 or newer: make PY=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	$(PY) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

install: $(READY)  ## make .venv and install the package in it

demo: $(READY)  ## train OKADFA beside its baseline on the embedded corpus, write runs/demo/
	$(BIN)/okadfa demo --out runs/demo

test: $(READY)  ## modules in sync, notebooks clean, every notebook cell, pytest
	$(BIN)/python -m pytest -q tests/test_sync.py
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_test --n_workers 2 --timing
	$(BIN)/python -m pytest tests

docs: $(READY)  ## build the site with quarto, or check the processed notebooks statically
	$(BIN)/python tests/docs_check.py --build

bench: $(READY)  ## run every benchmark of this machine, append rows to results/
	$(BIN)/okadfa benchmark head --out results

figures: $(READY)  ## re-run the figure notebooks from results/
	cd nbs/figures && for f in fig_*.ipynb; do PATH="$(CURDIR)/$(BIN):$$PATH" ../../$(BIN)/jupyter nbconvert --to notebook --execute --inplace $$f || exit 1; done
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_clean

clean:     ## remove what the other targets made, .venv excepted
	rm -rf runs _docs _proc build dist *.egg-info .pytest_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: help install demo test docs bench figures clean
