# Everything a user or a maintainer runs. Each target makes the environment first if it is missing or out of date.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := codebook_builder runtime schemas reference_vlm jobs benchmarks tests

.PHONY: help demo test lint types bench pages fault reference clean
help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "codebook-prune needs Python 3.11 or newer; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[build,cpu,report,s3,video,dev]'
	@touch $(STAMP)

demo: $(STAMP)  ## build a codebook with a local Ray job, then prune held-out images; writes demo/
	$(BIN)/python -m reference_vlm.demo --out demo

test: $(STAMP)  ## run every test
	$(BIN)/python -m pytest

lint: $(STAMP)  ## ruff check and format check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy, strict
	$(BIN)/mypy

bench: $(STAMP)  ## run the benchmarks, write benchmarks/results/*.json and the pages made from them (hours; accuracies resume)
	$(BIN)/python -m benchmarks.build
	$(BIN)/python -m benchmarks.whole_builds
	$(BIN)/python -m benchmarks.selection
	$(BIN)/python -m benchmarks.runtime
	$(BIN)/python -m benchmarks.throughput
	$(BIN)/python -m benchmarks.exactness
	$(BIN)/python -m benchmarks.reliability hostile
	$(BIN)/python -m benchmarks.reliability soak
	$(BIN)/python -m benchmarks.accuracy
	$(BIN)/python -m benchmarks.influence
	$(BIN)/python -m benchmarks.ablation
	$(BIN)/python -m benchmarks.context
	$(MAKE) pages

pages: $(STAMP)  ## write the figures in README.md and docs/ from benchmarks/results
	$(BIN)/python -m benchmarks.readme
	$(BIN)/python -m benchmarks.accuracy_page

reference: $(STAMP)  ## train the reference VLM from scratch (hours on 2 cores; resumes)
	$(BIN)/python -m reference_vlm.train --out runs/reference

fault: $(STAMP)  ## inject 30 faults into builds on a real local Ray cluster of two nodes; NOW=3 of them at a time, RESUME=1 counts other commits
	$(BIN)/python -m benchmarks.reliability faults $(if $(NOW),--now $(NOW)) $(if $(RESUME),--resume)

clean:  ## remove the environment, caches and demo output
	rm -rf $(VENV) demo .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
