# Everything runs inside .venv, which the first target that needs it builds.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
BIN := .venv/bin
CODE := $(wildcard src tests scripts benchmarks examples)

# A finished run is never overwritten: the second `make train` gets a folder named by the time.
ifndef RUN
RUN := $(if $(wildcard runs/quickstart),runs/quickstart-$(shell date +%Y%m%d-%H%M%S),runs/quickstart)
endif

.PHONY: help venv train test lint verify bench studies clean

help:
	@echo 'make train    set up, then train the 135M default model with the quick-start recipe'
	@echo 'make test     lint, types and all tests'
	@echo 'make verify   long proofs and the mutation check; results in docs/results/'
	@echo 'make bench    gmpo and TRL in turns on three workloads (two hours or more; goes on where it was);'
	@echo '              without bf16 units DTYPE=fp32 is sooner done'
	@echo 'make studies  growth, precision, learning curves, time to an accuracy (three hours; goes on where it was)'
	@echo 'make lint     ruff and mypy only'
	@echo 'make venv     set up only'
	@echo 'make clean    remove caches and build output; keeps .venv and runs/'

venv: .venv/.stamp

.venv/.stamp: pyproject.toml constraints.txt scripts/setup_environment.py
	$(PYTHON) scripts/setup_environment.py --venv .venv --stamp $@

# Training needs none of the optional packages; the tests need them all.
.venv/.extras-stamp: .venv/.stamp
	$(PYTHON) scripts/setup_environment.py --extras --venv .venv --stamp $@

train: venv
	@cat .venv/.stamp
	@echo "default model: $$($(BIN)/python -c 'from gmpo.policy.load import model_folder; print(model_folder("smollm2-135m"))')"
	$(BIN)/gmpo train quickstart --run $(RUN)

lint: .venv/.extras-stamp
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

# Three workers with one thread each, on two cores, because a quarter of the time one of two would
# wait for a process or a clock. A file is a group, and those with the real model are one
# (tests/scheduling.py). In the order of collection, because unit tests come last: their files end
# within seconds, so that no worker waits long for the others.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadgroup --no-loadscope-reorder -r s --durations 10

verify: .venv/.extras-stamp
	mkdir -p docs/results
	$(BIN)/python -m scripts.mutation --json docs/results/mutation.json
	$(BIN)/python -m scripts.parity --json docs/results/parity.json
	$(BIN)/python -m scripts.verl_check --json docs/results/verl.json
	$(BIN)/python -m pytest -m verify -r a | tee docs/results/verify.txt

# A workload whose updates differ in bf16 is refused (exit code 3) and compared in fp32. The update by the share of
# live groups is measured on one workload, three times a share: TRL makes a whole round for each, twelve together.
# Without bf16 units DTYPE=fp32 saves the trial of TRL's settings in bf16, which takes most of the time there.
DTYPE := auto
bench: .venv/.extras-stamp
	for workload in short words long-prompt; do \
	    set -- -m benchmarks.vs_trl --workload $$workload --dtype $(DTYPE) --json runs/bench/$$workload.json; \
	    if [ $$workload = short ]; then set -- "$$@" --live-shares 3; fi; \
	    $(BIN)/python "$$@" || { [ $$? -eq 3 ] && $(BIN)/python "$$@" --dtype fp32; } || exit; \
	done

# Learning curves that differ end with exit code 3, which stops here.
studies: .venv/.extras-stamp
	$(BIN)/python -m benchmarks.growth --with-trl --json runs/bench/growth.json
	$(BIN)/python -m scripts.precision --json runs/bench/precision.json
	$(BIN)/python -m benchmarks.time_to_accuracy --json runs/bench/time_to_accuracy.json
	$(BIN)/python -m benchmarks.learning_curves --rounds 6 --set training.schedule=constant --seeds 0 1 2 3 4 5 \
	    --json runs/bench/learning_curves.json

clean:
	rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
