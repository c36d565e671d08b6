# `make demo` shows it, `make test` checks it. Both make their own .venv first.
PY  ?= python3
BIN := .venv/bin
READY := .venv/.ready
.DEFAULT_GOAL := help

help:      ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile

# torch goes first and alone, so that the pinned build is the one every other package finds.
# A .venv that an interruption left half made is marked `.unfinished`, and the next make starts it afresh.
$(READY): settings.ini setup.py constraints.txt
	@command -v $(PY) >/dev/null || { echo "$(PY) is not there: install Python 3.11 or newer, or say make PY=/path/to/python3.11" >&2; exit 1; }
	@$(PY) -c 'import sys; sys.exit("okadfa needs Python 3.11 or newer: make PY=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	@$(PY) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PY) has no venv module: install it (Debian and Ubuntu: apt-get install python3-venv) and run make again" >&2; exit 1; }
	@if [ -e .venv/.unfinished ]; then rm -rf .venv; fi
	@mkdir -p .venv && rm -f $@ && touch .venv/.unfinished
	$(PY) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@ && rm .venv/.unfinished

install: $(READY)  ## make .venv and install the package in it

demo: $(READY)  ## train three models on the embedded corpus, time them on longer texts, write runs/demo/
	$(BIN)/okadfa demo --out runs/demo

# One thread a worker: two workers with all the cores each spend most of their time waiting for one another.
# A worker that has done its half of the tests takes some of the other's (worksteal).
WORKERS ?= 2
test: $(READY)  ## style, modules in sync, notebooks clean, every notebook cell, pytest
	$(BIN)/ruff check tests okadfa nbs
	$(BIN)/python -m pytest -q tests/test_sync.py tests/test_style.py
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/nbdev_test --n_workers $(WORKERS) --timing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/test_sync.py --ignore tests/test_style.py -n $(WORKERS) --dist worksteal

docs: $(READY)  ## build the site with quarto and look at it, or check the processed notebooks statically
	$(BIN)/python tests/docs_check.py --build
	@if command -v quarto >/dev/null; then $(MAKE) --no-print-directory pages; fi

# Needs Chromium, and `pip install -e '.[pages]'`; says so where one is missing. PAGES='--need --shots shots' for more
PAGES ?=
pages: $(READY)  ## look at the built pages in headless Chromium: links, anchors, widths, contrast, requests
	$(BIN)/python tests/pages_check.py $(PAGES)

bench: $(READY)  ## run every benchmark of this machine, append rows to results/
	for t in float32 bfloat16; do $(BIN)/okadfa benchmark head --dtype $$t --out results || exit 1; done
	$(BIN)/okadfa benchmark memory --out results
	$(BIN)/okadfa benchmark pipeline --out results
	@# performer-pytorch is measured beside ours where it is installed: $(BIN)/pip install -e '.[bench]'
	$(BIN)/okadfa benchmark attention --out results
	$(BIN)/okadfa benchmark attention --n 65536 --what training --variants favor --out results
	$(BIN)/okadfa benchmark spectral --out results

# DATA and TOKENIZER may be folders, where there is no network: make wikitext DATA=.../wikitext-2 TOKENIZER=.../gpt2-bpe
SEEDS     ?= 0 1 2
DATA      ?= wikitext-2
TOKENIZER ?= gpt2
WIKITEXT  := --data $(DATA) --tokenizer $(TOKENIZER) --preset tiny --steps 100 --batch-size 16 --lr 2e-3 --results results/wikitext.jsonl
OKADFA    ?= $(BIN)/okadfa
wikitext:  ## OKADFA and its baseline on WikiText-2, rows appended to results/wikitext.jsonl
	@test -n '$(filter-out $(BIN)/okadfa,$(OKADFA))' || $(MAKE) --no-print-directory $(READY)
	for s in $(SEEDS); do \
	  $(OKADFA) train $(WIKITEXT) --seed $$s --out runs/wikitext/okadfa-$$s || exit 1; \
	  $(OKADFA) train $(WIKITEXT) --seed $$s --out runs/wikitext/baseline-$$s --mixer softmax --credit bp --ortho 0 || exit 1; \
	done

# About an hour and a half on one core. The model has fewer than 10 million parameters; BYTES= gives it another size or another budget
BYTES     ?= --n-layers 4 --max-len 512 --steps 5500 --batch-size 8 --lr 3e-3 --warmup 200 --diag-every 500
bytes:     ## a byte model of both mixers in turn on WikiText-2, beside compressors and quantized, rows appended to results/
	@test -n '$(filter-out $(BIN)/okadfa,$(OKADFA))' || $(MAKE) --no-print-directory $(READY)
	$(OKADFA) train --data $(DATA) --mixer spectral+softmax --credit bp --ortho 0 $(BYTES) --out runs/bytes --results results/bytes.jsonl
	$(OKADFA) benchmark compression runs/bytes --data $(DATA) --stride 256 --out results
	$(OKADFA) quantize runs/bytes --bits 3,4,5.85,6 --split test --out runs/bytes-quantized --results results

# Some hours on one core; finished rows are skipped. Another model: make weights WEIGHTS='runs/bytes --window 128 --tokens 65536'
WEIGHTS   ?= --seeds 0,1,2
VALID     ?= $(DATA)/valid.txt
weights: $(READY)  ## perplexity beside bits a weight: ours, NF4, k-quants; rows appended to results/weights.jsonl
	$(BIN)/okadfa benchmark weights $(WEIGHTS) --data $(VALID) --rows results/weights.jsonl --out results

# Hours on two cores. It may be stopped and started at will: finished rows are skipped, and a second `make ablate` beside the first shares the work.
LRS       ?= 3e-3,6e-3,1e-2
ablate: $(READY)  ## every credit rule, then the six arms, three seeds, rows appended to results/ablate.jsonl
	$(BIN)/okadfa ablate rules --lrs $(LRS)
	$(BIN)/okadfa ablate arms

# Some hours on two cores, to be stopped and started as `make ablate`; the commands are those of fig_depth
depth: $(READY)   ## direct feedback in 6 to 96 blocks, beside backpropagation and frozen blocks; rows in results/depth/
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -c 'from okadfa.run.rerun import rerun; rerun("fig_depth", root=".")'

# A CUDA machine may have its own Python with torch and no room for another: make gpu PYTHON=python3
PYTHON ?= $(BIN)/python
gpu:       ## on a CUDA machine: CUDA tests, benchmarks and WikiText-2 runs, rows appended to results/
	PYTHONPATH="$(CURDIR)" $(PYTHON) -m pytest tests/test_cuda.py tests/test_kernels_*.py
	for t in float32 bfloat16; do PYTHONPATH="$(CURDIR)" $(PYTHON) -m okadfa.run.cli benchmark head --dtype $$t --out results || exit 1; done
	PYTHONPATH="$(CURDIR)" $(PYTHON) -m okadfa.run.cli benchmark memory --out results
	PYTHONPATH="$(CURDIR)" $(PYTHON) -m okadfa.run.cli benchmark attention --device cuda --dtype bfloat16 --n 2048,8192,32768 --out results
	PYTHONPATH="$(CURDIR)" $(PYTHON) -m okadfa.run.cli benchmark spectral --device cuda --what 'layer forward,layer training,model forward,model training' --n 512,1024,2048,4096,8192,16384 --out results
	$(MAKE) wikitext OKADFA='PYTHONPATH="$(CURDIR)" $(PYTHON) -m okadfa.run.cli'
	$(MAKE) bytes OKADFA='PYTHONPATH="$(CURDIR)" $(PYTHON) -m okadfa.run.cli' BYTES='--n-layers 8 --d-model 320 --n-heads 5 --max-len 1024 --steps 3000 --batch-size 64 --lr 2e-3 --warmup 200 --diag-every 1000'

# RERUN=1 first runs what makes the rows. With SIZE=quick or RESULTS=folder the executed notebooks go to runs/figures/,
# and nothing that is committed changes.
FIGURES_TO = $(if $(filter quick,$(SIZE))$(RESULTS),--output-dir "$(CURDIR)/runs/figures",--inplace)
figures: $(READY)  ## execute the figure notebooks; RERUN=1 makes their rows first, SIZE=quick in minutes
	cd nbs/figures && for f in fig_*.ipynb; do PATH="$(CURDIR)/$(BIN):$$PATH" ../../$(BIN)/jupyter nbconvert --to notebook --execute $(FIGURES_TO) $$f || exit 1; done
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/nbdev_clean

clean:     ## remove what the other targets made, .venv excepted
	rm -rf runs _docs _proc build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

.PHONY: help install demo test docs pages bench wikitext bytes weights ablate depth gpu figures clean
