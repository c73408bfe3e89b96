# Everything starts here: `make quickstart`, `make test`, `make help`.
PYTHON ?= python3
VENV ?= .venv
# Options for pip, for example the index of torch's CPU builds (pytorch.org/get-started) on a machine without a GPU.
PIP_ARGS ?=
EXTRAS ?= test
DATA ?= data/sample
RUN ?= runs/quickstart
# Options of the quickstart's evaluation: the starts of a few held-out documents a subject.
EVALUATE ?= --documents 8 --calibration-documents 6 --document-tokens 512
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-long lint modularity ablations benchmarks cluster-benchmarks clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-18s %s\n", $$1, $$2}'

install: $(VENV)/.installed  ## make the environment in .venv and install the project into it

$(VENV)/.installed: pyproject.toml
	@echo "== making the environment in $(VENV) (torch is the large part)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PIP_ARGS) -e '.[$(EXTRAS)]'
	@touch $@

$(DATA)/dataset.json: | $(VENV)/.installed
	@echo "== tokenizing the embedded corpus into $(DATA)"
	$(BIN)/emotrain prepare sample --out $(DATA) --train-tokenizer --vocab-size 4096

quickstart: $(DATA)/dataset.json  ## documents -> a small EMO -> its expert subsets -> a report, in minutes on a CPU
	@start=$$(date +%s); \
	{ echo "== training a small EMO" && \
	$(BIN)/emotrain train configs/quickstart.yaml data.path=$(DATA) training.run_dir=$(RUN) && \
	echo "== evaluating expert subsets on held-out documents" && \
	$(BIN)/emotrain evaluate $(RUN) --data $(DATA) --keep 1.0 0.5 0.25 0.125 $(EVALUATE) && \
	echo "== writing the report" && \
	$(BIN)/emotrain report $(RUN) && \
	$(BIN)/python benchmarks/quickstart.py --seconds $$(($$(date +%s) - start)) && \
	echo "== done: open $(RUN)/report.html; numbers in $(RUN)/evaluation, checkpoints in $(RUN)/checkpoints"; } || \
	{ echo "== not finished: the same command goes on from the newest checkpoint (make quickstart)"; exit 1; }

.megablocks/.installed: | $(VENV)/.installed
	@echo "== fetching MegaBlocks' Python sources for the tests of its adapter"
	@$(BIN)/python tests/megablocks_sources.py .megablocks && touch $@ || echo "== not to be had: those tests will be skipped"

test: $(VENV)/.installed .megablocks/.installed  ## run the tests (a few minutes on 2 cores)
	@echo "== running the tests; their settings are in pyproject.toml"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-long: $(VENV)/.installed .megablocks/.installed  ## run the tests marked long
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long

lint: $(VENV)/.installed  ## the formatter, the linter and the type checker, none of which changes a file
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

modularity: $(DATA)/dataset.json  ## the proof in small: EMO against a standard MoE, up to 90 minutes on 2 cores
	$(BIN)/python benchmarks/modularity.py --data $(DATA) --out runs/modularity

ablations: $(DATA)/dataset.json  ## which pool teaches modules best: 33 runs of the quickstart's size, resumable
	$(BIN)/python benchmarks/ablations.py configs/ablations/pools.yaml --data $(DATA)

benchmarks: $(DATA)/dataset.json  ## router, step and expert timings, also against transformers (on an idle machine), and the kernels' roofline
	$(BIN)/pip install --quiet $(PIP_ARGS) -e '.[bench]'
	$(BIN)/python benchmarks/router.py
	$(BIN)/python benchmarks/step.py --peer hf
	$(BIN)/python benchmarks/experts.py
	$(BIN)/python benchmarks/lazy_experts.py
	$(BIN)/python benchmarks/roofline.py
	$(BIN)/python benchmarks/contention.py --data $(DATA)

cluster-benchmarks: $(DATA)/dataset.json  ## what can be measured of a cluster without one: exchange, schedule, planned memory, scale
	$(BIN)/python benchmarks/dispatch.py
	$(BIN)/python benchmarks/balance_schedule.py --data $(DATA)
	$(BIN)/python benchmarks/placement.py --data $(DATA)
	$(BIN)/python benchmarks/plan_memory.py
	$(BIN)/python benchmarks/scaling.py

clean:  ## remove runs and prepared data (not the environment)
	rm -rf runs data
