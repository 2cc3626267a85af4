# `make demo` and `make test` do everything on a fresh machine with Python >= 3.10.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# pip's own notice of newer versions and caches of other users are noise here.
PIP = $(BIN)/python -m pip --disable-pip-version-check

# A process for each core, each with one thread: two that want both cores wait for each other.
WORKERS ?= 2
# -rs: a test that was left out, for want of a browser or a GPU, is named.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -rs

.PHONY: demo test test-slow lint bench gpu report fuzz soak docs clean

demo: $(VENV)/.installed
	$(BIN)/python -m erk_guid demo --outdir output/demo

test: $(VENV)/.installed-dev lint
	$(PYTEST) -m "not slow"

# The rest of the tests: processes, kills and resumes, the wheel, the shipped model at length.
test-slow: $(VENV)/.installed-dev
	$(PYTEST) -m slow

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

# One table of times and memory against their targets, about twenty minutes on two cores.
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/bench.py

# What only a CUDA device can show, in under eight minutes; writes docs/gpu.md. It needs torch alone.
gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) scripts/gpu.py

# The site, in output/site; every link is checked.
docs: $(VENV)/.installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Every reader of files against hostile inputs: over two hours; ARGS=--short for two minutes.
fuzz: $(VENV)/.installed-dev
	PYTHONHASHSEED=0 OMP_NUM_THREADS=1 $(BIN)/python -m scripts.fuzz $(ARGS)

# Kills, full disks and lying servers against real runs: ten minutes; ARGS="--minutes=60 --jobs=2".
soak: $(VENV)/.installed
	$(BIN)/python -m scripts.soak $(ARGS)

# The experiment of docs/digits.md: over an hour on two cores; NUM=100 for a first look.
NUM ?= 1000
report: $(VENV)/.installed
	$(BIN)/python -m erk_guid reproduce --table digits --num $(NUM) --outdir output/digits-report

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(PIP) install -e '.[all]'
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -e '.[all,dev]'
	# One of its modules is compared with; what the others need is not wanted.
	$(PIP) install --no-deps k-diffusion==0.1.1.post1
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info output
