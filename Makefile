# Needs Python 3.11, make and a package index; everything else is installed into .venv.
PYTHON ?= python3
VENV ?= .venv
TARGET ?= jetson
ARGS ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready

export ORT_DISABLE_TELEMETRY := 1

.PHONY: build test lint format clean

build: $(READY)
	$(BIN)/python -m pipeline build --target $(TARGET) $(ARGS)

# One thread a worker: two workers that each use every core would wait for one another.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# torch first and alone: with it in place no other package can pull another build of it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "needs Python 3.11 or newer with venv (Debian: apt-get install python3-venv); or: make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools torch numpy
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[build,cpu,serve,test]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[rtx]' \
	  || echo "tensorrt-rtx is not to be had here: jetson and cuda graphs are not proved against NVIDIA's builder"
	touch $(READY)
