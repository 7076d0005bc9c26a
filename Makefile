# Each target makes the environment it needs. PYTHON chooses the interpreter (3.10 or later).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint peers slow tensorrt bench bench-training bench-gpu clean

demo: $(STAMP)
	$(BIN)/modernbert demo

# Files of tests side by side in two processes of one thread each; more would wait for each other on two cores.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The same bundle in other tools, each in an environment of its own.
peers: $(STAMP)
	$(BIN)/python -m pytest -m peers

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow

# TensorRT's plans built and run on a machine that has it and a GPU: nothing is installed, so PYTHON must have them.
tensorrt:
	$(PYTHON) -m pytest -m tensorrt tests/test_tensorrt_gpu.py

# Our export against transformers' on this machine: 15 minutes, 20 GB.
bench: $(STAMP)
	$(BIN)/python benchmarks/export_latency.py

# Our training step against transformers' on this machine: two hours on two cores, 20 GB. ARGS='--parts layer' and others
# choose a part.
bench-training: $(STAMP)
	$(BIN)/python benchmarks/training_step.py $(ARGS)

# On a machine with a GPU, as it is: nothing is installed, so PYTHON must have torch and transformers.
bench-gpu:
	PYTHONPATH=.:export:runtime $(PYTHON) benchmarks/gpu.py $(ARGS)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) .venv-peers demo-output build *.egg-info
