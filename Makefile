# Everything runs in .venv, made from a complete list of pins: constraints-cpu.txt (make venv) or constraints-gpu.txt (make gpu).
# It is made again when the pins change. Variables:
#   PYTHON=PATH      take this Python instead of the newest supported one that starts
#   TORCH_INDEX=URL  a package index that offers CPU builds of torch, beside your own: a third of the download for make venv
VENV := .venv
BIN  := $(VENV)/bin
PIP  := $(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
CPU  := $(VENV)/.installed
GPU  := $(VENV)/.installed-gpu
ANY  := $(if $(wildcard $(GPU)),$(GPU),$(CPU))
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The Pythons for which all pinned packages are built, newest first.
VERSIONS := 3.13 3.12 3.11
$(GPU): VERSIONS := 3.12 3.11
# Candidates are started, not only found: a pyenv shim may lead nowhere, and Debian's python3 comes without ensurepip.
PYTHON ?= $(shell for version in $(VERSIONS); do for python in python$$version python3; do \
  $$python -c "import sys, ensurepip; '%d.%d' % sys.version_info[:2] == '$$version' and print(sys._base_executable)" 2> /dev/null; \
  done; done | head -1)

.PHONY: help venv gpu demo check test lint bench clean

help:
	@printf "make venv   make .venv without a GPU: 3.7 GB to download, 8 GB of disk; where a CPU build of torch is offered\n            (pip settings, or TORCH_INDEX=URL), 1.3 and 5 GB\n"
	@echo "make gpu    make .venv for an NVIDIA GPU: driver 580 or newer, 3.8 GB to download, 9 GB of disk"
	@echo "make demo   the whole platform on an embedded shop, without a GPU"
	@echo "make check  lint and all tests without Ray, vLLM, Unsloth or a GPU (two minutes)"
	@echo "make test   lint and the whole test suite"
	@echo "make lint   ruff and mypy"
	@echo "make bench  the CPU benchmarks; results go to bench/results"

venv: $(CPU)
gpu: $(GPU)

# The lists are complete, so nothing is resolved: --no-deps keeps pip from adding packages that break beside others (what and
# why: tests/test_lists.py). In the CPU stack torch goes first and alone, with its dependencies: they differ between its builds.
$(CPU): constraints-cpu.txt pyproject.toml
	$(call new_venv,$(GPU))
	@if $(PIP) --dry-run --ignore-installed --no-deps --report - --constraint constraints-cpu.txt torch | grep -q '"version": "[0-9.]*+cpu"'; \
	then echo "installing a CPU build of torch (0.2 GB to download) ..."; \
	else echo "installing torch with its CUDA libraries (2.7 GB to download): no index offers a CPU build; make TORCH_INDEX=URL names one ..."; fi
	$(PIP) --constraint constraints-cpu.txt torch
	@echo "installing the pinned stack: Ray, transformers, vLLM, Unsloth ... (1 GB to download, about 2 minutes) ..."
	$(PIP) --no-deps --requirement constraints-cpu.txt
	$(call finish)

$(GPU): constraints-gpu.txt pyproject.toml
	$(call new_venv,$(CPU))
	@echo "installing the pinned stack: torch with CUDA 13, Ray, transformers, vLLM, Unsloth ... (3.8 GB to download) ..."
	$(PIP) --no-deps --requirement constraints-gpu.txt
	$(call finish)

# $(1): the stamp of the other stack. Of one stack, what is installed is kept; another stack or Python starts anew.
define new_venv
	@test "$$(uname -sm)" = "Linux x86_64" || { echo "The pinned stack needs Linux on x86-64, this is $$(uname -sm): vLLM has no builds of it for others." >&2; exit 1; }
	@python="$(PYTHON)"; \
	test -n "$$python" || { echo "No Python of $(VERSIONS) that has ensurepip (Debian and Ubuntu: python3-venv). Name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }; \
	version=$$("$$python" -c "import sys; print('%d.%d' % sys.version_info[:2])") || exit 1; \
	case " $(VERSIONS) " in *" $$version "*) ;; *) echo "The pinned stack needs a Python of $(VERSIONS), $$python is $$version: make PYTHON=/path/to/python3.12" >&2; exit 1;; esac; \
	echo "making $(VENV) with $$("$$python" --version), $$python"; \
	test -x $(BIN)/python$$version -a ! -e $(1) || rm -rf $(VENV); \
	"$$python" -m venv $(VENV)
	$(PIP) --upgrade pip
endef

define finish
	$(PIP) --no-deps --no-build-isolation --editable .
	$(BIN)/python -m vlrank.compat
	@touch $@
endef

demo: $(ANY)
	$(BIN)/vlrank demo

lint: $(ANY)
	$(BIN)/ruff check platform jobs tests bench
	$(BIN)/ruff format --check platform jobs tests bench
	$(BIN)/mypy

# Two processes, a file each: Ray, vLLM and Unsloth take their time to start, and one waits while the other works. Files keep
# the order of tests/conftest.py, the longest first; xdist's own begins with those of many tests, which are the short ones.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# All tests that need neither Ray, vLLM, Unsloth nor a GPU.
check: lint
	$(PYTEST) -m "not stack"

test: lint
	$(PYTEST)

bench: $(ANY)
	$(BIN)/python bench/metrics.py --out bench/results/metrics.json
	$(BIN)/python bench/kcore.py --out bench/results/kcore.json

clean:
	rm -rf $(VENV) vlrank-demo .pytest_cache .mypy_cache .ruff_cache
