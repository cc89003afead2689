# Three environments, each made when it is first needed: .venv, in which `make demo` finds what it
# needs (requirements-demo.txt) and development the rest (requirements-dev.txt); .venv-cuda, with a
# CUDA build of the oldest torch, for cuda-build; and .venv-newest, with the newest Python and torch,
# for newest.
PYTHON ?= python3
export PYTHON
# The newest that is found, on PATH or under pyenv, and that packages can be built for.
PYTHON_NEWEST ?= $(shell for name in python3.14 python3.13 python3.12; do \
  for python in $$name $${PYENV_ROOT:-$$HOME/.pyenv}/versions/*/bin/$$name; do \
    $$python -c 'import ensurepip, os, sysconfig; os.stat(sysconfig.get_path("include"))' \
      2>/dev/null && echo $$python && exit; done; done)

VENV := .venv
VENV_CUDA := .venv-cuda
VENV_NEWEST := .venv-newest
# With an environment's tools on PATH: pre-commit looks there for ruff.
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin
RUN_CUDA := PATH="$(CURDIR)/$(VENV_CUDA)/bin:$$PATH" $(VENV_CUDA)/bin
RUN_NEWEST := PATH="$(CURDIR)/$(VENV_NEWEST)/bin:$$PATH" $(VENV_NEWEST)/bin

NATIVE := adamal_kernels/build_config.py $(shell find csrc -type f)
PACKAGE := $(shell find adamal_kernels -name '*.py')
# What depends on Python's and torch's own objects, whose layout and interfaces change.
CORE_TESTS := $(addprefix tests/optimizer/test_,optimizer.py plan.py traps.py bad_input.py) \
  $(addprefix tests/fast_path/test_,steady_state.py dict_version.py shared_walk.py) \
  $(addprefix tests/checkpoints/test_,checkpoint.py saved_before.py)

.NOTPARALLEL:
.PHONY: help demo test bench bench-check paper build cuda-build newest newest-bench-check \
  gpu-check lint format clean

help:  ## Show this list.
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

demo: build  ## Train a small GPT with Adam and with AdamAL, side by side.
	@echo "Training twice: a minute or two"
	@$(RUN)/python examples/train_gpt.py

test: build $(VENV)/.developing  ## Run the whole test suite, by a worker a core. PYTEST_ARGS are passed on.
	$(RUN)/python -m pytest tests -n logical --maxprocesses 4 --dist worksteal $(PYTEST_ARGS)

bench: build  ## Time a step against torch's, table and plot in benchmarks/results/. BENCH_ARGS are passed on.
	@mkdir -p benchmarks/results
	$(RUN)/python -m adamal_kernels bench --json 'benchmarks/results/bench-{device}-{date}.json' \
	  --plot 'benchmarks/results/bench-{device}-{date}.png' $(BENCH_ARGS)

bench-check: build  ## Compare the host's instructions per tensor with those recorded; needs valgrind.
	$(RUN)/python benchmarks/host_instructions.py

paper: build $(VENV)/.developing  ## Test the paper's claims, records and plots in benchmarks/paper/results/. PAPER_ARGS are passed on.
	$(RUN)/python -m benchmarks.paper $(PAPER_ARGS)

build: $(VENV)/.built  ## Build the extensions in place: C++, and CUDA given nvcc and a CUDA torch.

cuda-build: $(VENV_CUDA)/.built  ## Build and import everything against a CUDA build of torch, the oldest; needs nvcc, no GPU.
	@cd $(VENV_CUDA) && bin/python -c 'import torch, adamal_kernels._C, adamal_kernels._cuda; \
	  from adamal_kernels.build_info import extension_record as record; \
	  print(record("_C"), record("_cuda"), "imported both", sep="\n")'
	cd $(VENV_CUDA) && bin/python -m adamal_kernels info
	cd $(VENV_CUDA) && bin/python -m adamal_kernels verify --backend cpu

newest: $(VENV_NEWEST)/.built  ## Build, test and verify on the newest Python found (3.12 on) and the newest torch.
	$(RUN_NEWEST)/pytest $(CORE_TESTS) -n logical --maxprocesses 4 --dist worksteal
	cd $(VENV_NEWEST) && bin/python -m adamal_kernels verify

newest-bench-check: $(VENV_NEWEST)/.built  ## As bench-check, there.
	$(RUN_NEWEST)/python benchmarks/host_instructions.py

gpu-check:  ## On a machine with an NVIDIA GPU: check and measure in nine minutes, with PYTHON's packages. GPU_CHECK_ARGS are passed on.
	.ci/gpu-check $(GPU_CHECK_ARGS)

lint: $(VENV)/.developing  ## Check style, and correct what the formatters can.
	$(RUN)/pre-commit run --all-files --show-diff-on-failure

format: $(VENV)/.developing  ## Format the sources, and apply ruff's fixes.
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .
	$(RUN)/clang-format -i $(shell find csrc tests/native -type f)

clean:  ## Remove what was built, and all environments.
	rm -rf build dist $(VENV) $(VENV_CUDA) $(VENV_NEWEST) adamal_kernels/_build.json adamal_kernels/*.so
	find . -name __pycache__ -prune -exec rm -rf {} +

# $(call make_venv,FOLDER). First looks for what would otherwise fail after gigabytes of downloads.
define make_venv
	@command -v $(PYTHON) >/dev/null || { echo >&2 \
	  "$(PYTHON) was not found: install Python 3.10 or newer, or name one: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo >&2 \
	  "$(PYTHON) is too old (`$(PYTHON) -V 2>&1`): name Python 3.10 or newer: make PYTHON=..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo >&2 \
	  "$(PYTHON) has no venv module (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	@command -v $${CXX:-c++} >/dev/null || { echo >&2 \
	  "no C++ compiler: install g++ (Debian, Ubuntu: apt-get install g++), or set CXX"; exit 1; }
	@$(PYTHON) -m venv $(1)
endef

# $(call quietly,WHAT,COMMAND): a line says what is done, and the rest goes into a log.
LOG := build/make.log
define quietly
	@mkdir -p $(dir $(LOG)); echo "$(1)"; { $(2); } >$(LOG) 2>&1 || { \
	  tail -n 20 $(LOG); echo >&2 "that failed; all it printed is in $(LOG)"; exit 1; }
endef

$(VENV)/.installed: requirements-demo.txt
	$(call make_venv,$(VENV))
	$(call quietly,Installing torch and matplotlib into $(VENV): a minute or two,\
	  $(RUN)/python -m pip install -r requirements-demo.txt && \
	  ADAMAL_BUILD=none $(RUN)/python -m pip install --no-build-isolation --no-deps -e .)
	@touch $@

$(VENV)/.developing: $(VENV)/.installed requirements-dev.txt
	$(call quietly,Installing what the tests need into $(VENV): a minute or two,\
	  $(RUN)/python -m pip install -r requirements-dev.txt)
	@touch $@

# Fails where _C is missing, so that no test is left out for want of it.
$(VENV)/.built: $(VENV)/.installed $(NATIVE)
	@$(RUN)/python -m adamal_kernels build
	@touch $@

$(VENV_CUDA)/.installed: requirements-cuda.txt
	$(call make_venv,$(VENV_CUDA))
	$(RUN_CUDA)/python -m pip install -r requirements-cuda.txt
	@touch $@

$(VENV_CUDA)/.built: $(VENV_CUDA)/.installed setup.py pyproject.toml $(NATIVE) $(PACKAGE)
	ADAMAL_BUILD=cuda $(RUN_CUDA)/python -m pip install -v --no-build-isolation --no-deps \
	  --force-reinstall .
	@touch $@

$(VENV_NEWEST)/.installed: PYTHON = $(PYTHON_NEWEST)
$(VENV_NEWEST)/.installed: requirements-newest.txt
	@test -n "$(PYTHON)" || { echo >&2 "no Python 3.12 or newer with venv and headers was found on \
	PATH or under pyenv: install one, or name it: make newest PYTHON_NEWEST=..."; exit 1; }
	$(call make_venv,$(VENV_NEWEST))
	$(RUN_NEWEST)/python -m pip install -r requirements-newest.txt
	@touch $@

$(VENV_NEWEST)/.built: $(VENV_NEWEST)/.installed $(NATIVE) $(PACKAGE)
	ADAMAL_BUILD=cpu $(RUN_NEWEST)/python -m pip install -v --no-build-isolation --no-deps \
	  --force-reinstall .
	@touch $@
