# Everything runs in .venv, made from constraints-cpu.txt; it is made again when the pins change.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help venv demo test lint bench clean

help:
	@echo "make venv   make .venv with the pinned CPU stack (about 3 minutes, 5 GB)"
	@echo "make demo   the whole platform on an embedded shop, without a GPU"
	@echo "make test   lint and the whole test suite"
	@echo "make lint   ruff and mypy"
	@echo "make bench  the CPU benchmarks; results go to bench/results"

venv: $(STAMP)

# The pins are a complete list, so nothing is resolved: --no-deps keeps pip from adding torchaudio and torchcodec, which do
# not load beside a CPU torch. Torch goes first and alone, with its dependencies: they differ between its builds.
$(STAMP): constraints-cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("vlrank needs Python 3.11, this is " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11" if sys.version_info[:2] != (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@echo "installing torch ..."
	$(BIN)/python -m pip install --quiet --constraint constraints-cpu.txt torch
	@echo "installing the pinned stack (Ray, transformers, vLLM, Unsloth ...), about 2 minutes ..."
	$(BIN)/python -m pip install --quiet --no-deps --requirement constraints-cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(BIN)/python -m vlrank.compat
	@touch $@

demo: venv
	$(BIN)/vlrank demo

lint: venv
	$(BIN)/ruff check platform jobs tests bench
	$(BIN)/ruff format --check platform jobs tests bench
	$(BIN)/mypy

# Two processes, a file each: Ray, vLLM and Unsloth take their time to start, and one waits while the other works.
test: lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

bench: venv
	$(BIN)/python bench/metrics.py --out bench/results/metrics.json
	$(BIN)/python bench/kcore.py --out bench/results/kcore.json

clean:
	rm -rf $(VENV) vlrank-demo .pytest_cache .mypy_cache .ruff_cache
