# Everything a person or a machine does here starts with one of these; each creates the environment it needs.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.thinrank
NPROC  ?= 1
TESTERS ?= 2
ARGS   ?=

.DEFAULT_GOAL := help
.PHONY: help pretrain finetune test check bench study wheel clean

help:  ## list these commands
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# One stamp for each set of extras, so that a first training run need not wait for the test tools.
$(STAMP)-train: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[train]"
	@touch $@

$(STAMP)-finetune: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[train,finetune]"
	@touch $@ $(STAMP)-train

$(STAMP)-dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[train,finetune,deepspeed,dev,compare,study]"
	@touch $@ $(STAMP)-train $(STAMP)-finetune $(STAMP)-study

$(STAMP)-study: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[train,study]"
	@touch $@ $(STAMP)-train

pretrain: $(STAMP)-train  ## train the default model (more: make pretrain ARGS="optimizer=galore model=9m" NPROC=2)
	$(BIN)/torchrun --standalone --nproc-per-node $(NPROC) launch/pretrain.py $(ARGS)

runs/pretrain/export/config.json:
	$(MAKE) pretrain ARGS=

finetune: $(STAMP)-finetune runs/pretrain/export/config.json  ## fine-tune what pretrain left: AdamW, LoRA, GaLore and GaLore+ side by side
	$(BIN)/python benchmarks/finetune.py $(ARGS)

test: $(STAMP)-dev  ## run the test suite, two files at a time (one part: make test ARGS=tests/optim TESTERS=0)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(TESTERS) --dist loadfile $(ARGS)

check: $(STAMP)-dev  ## lint, types, import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

bench: $(STAMP)-dev  ## measure optimizer steps beside the peers, on a GPU where there is one
	$(BIN)/python benchmarks/step.py $(ARGS)

study: $(STAMP)-study  ## tune and compare the methods on one job, table and plot (docs/study.md)
	$(BIN)/python benchmarks/study.py $(ARGS)

wheel: $(STAMP)-dev  ## build the distribution
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

clean:  ## remove what is built, not what was trained
	rm -rf build dist *.egg-info src/*.egg-info .pytest_cache .ruff_cache .hypothesis
