# Everything runs in .venv, which any target makes first if it is not there (.ci/setup_env.py). The demo needs less in
# it than the tests.

PYTHON ?= python3
VLLM ?= auto
TORCH_INDEX ?=
SEED ?= 0
ALGO ?= ppo
OUT ?=
BENCH ?=

VENV := .venv/bin
# A file's tests share what is slow to make. Three workers for two cores: many tests wait for a process of their own.
PYTEST := python -m pytest -n 3 --dist loadfile --no-loadscope-reorder
# The quotes keep an empty value an argument. The origin tells a PYTHON the user named from the default.
SETUP = @$(PYTHON) .ci/setup_env.py --vllm '$(VLLM)' --torch-index '$(TORCH_INDEX)' \
	$(if $(filter file,$(origin PYTHON)),,--python-chosen)
OLDEST := .venv-oldest

# With it set, each process would compile the project again, and pytest its tests.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup setup-demo setup-oldest demo evidence test test-slow test-oldest bench bench-merge bench-sweep bench-recipes bench-serve \
	bench-growth bench-quick gpu-check lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo '  demo takes SEED=0, ALGO=ppo|dpo|rloo|grpo, FULL=1, LORA=1 and OUT=folder; evidence takes QUICK=1 and'
	@echo "  STAGES=\"--list\" (or --only 'methods*', --seeds 0). For the set-up:"
	@echo '  PYTHON=python3.12         the interpreter to use (3.11 to 3.13; default python3)'
	@echo '  VLLM=auto|cpu|gpu|none    which vLLM (auto: gpu if nvidia-smi lists a GPU; an existing .venv is kept)'
	@echo '  TORCH_INDEX=URL           an extra package index for PyTorch, for instance the CPU builds at'
	@echo '                            https://download.pytorch.org/whl/cpu (on Linux, PyPI has the CUDA ones)'

setup: ## install everything into .venv (once; again only when its inputs change)
	$(SETUP)

setup-demo:
	$(SETUP) --for demo

setup-oldest:
	$(SETUP) --venv $(OLDEST) --constraints constraints-oldest.txt

# One plain command, so that make runs it directly and no shell stands between them; the variable asks the
# demo to end when make does.
demo: export REWARDED_LINES_DIE_WITH_PARENT = 1
demo: setup-demo ## train, merge, measure and report on a small example: the whole job
	$(VENV)/rewarded-lines demo --seed $(SEED) --algo $(ALGO)$(if $(FULL), --full)$(if $(LORA), --lora)$(if $(OUT), --out '$(OUT)')

evidence: export REWARDED_LINES_DIE_WITH_PARENT = 1
evidence: setup ## make all that eval/results claims, in stages that resume (a day on two cores; QUICK=1: 15 minutes)
	$(VENV)/python eval/evidence.py$(if $(QUICK), --quick)$(if $(STAGES), $(STAGES))

test: setup ## run the tests
	$(VENV)/$(PYTEST)

test-slow: setup ## run the tests that `make test` leaves out because they are slow (some hours)
	$(VENV)/$(PYTEST) -m '(slow or nightly) and not gpu and not network'

test-oldest: setup-oldest ## run the tests with the oldest versions that are supported, in .venv-oldest
	$(OLDEST)/bin/$(PYTEST)

bench: bench-merge bench-sweep ## measure merge and sweep against their peers

bench-merge: setup ## measure merge against mergekit, cp and itself (35 GB of disk; BENCH='--help')
	$(VENV)/python tests/benchmarks/merge_speed.py $(BENCH)

bench-sweep: setup ## measure sweep against the loop of the first code for it, on what `make demo` made (half an hour)
	$(VENV)/python tests/benchmarks/sweep_speed.py $(BENCH)

bench-recipes: setup ## measure a step of each recipe against bare TRL, on what `make demo` made (quarter of an hour)
	$(VENV)/python tests/benchmarks/recipe_overhead.py $(BENCH)

bench-serve: setup ## measure requests of many λ to one server, on what `make demo LORA=1` made (ten minutes)
	$(VENV)/python tests/benchmarks/serve_speed.py $(BENCH)

bench-growth: setup ## measure how time and memory grow with the work (half an hour, 12 GB of disk)
	$(VENV)/python tests/benchmarks/growth.py $(BENCH)

bench-quick: setup ## tell whether this tree is slower than the last release (3 minutes; BENCH='--against REV|WHEEL')
	$(VENV)/python tests/benchmarks/quick.py $(BENCH)

gpu-check: setup ## run on a GPU what no test can show without one: tests, merges, swaps, a sweep, training (8 minutes)
	$(VENV)/python tests/benchmarks/gpu_check.py $(BENCH)

lint: setup ## check style, formatting and types
	$(VENV)/ruff check .
	$(VENV)/ruff format --check .
	$(VENV)/mypy

format: setup ## fix style and formatting
	$(VENV)/ruff check --fix .
	$(VENV)/ruff format .

clean: ## remove .venv and .venv-oldest
	@$(PYTHON) .ci/setup_env.py --clean
	@$(PYTHON) .ci/setup_env.py --clean --venv $(OLDEST)
