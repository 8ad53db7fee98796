# mswift: `make demo`, `make test`, `make lint`; each prepares .venv first (once per change of the pins).
#
#   PYTHON=python3.12      the interpreter of .venv (3.11 or newer)
#   TORCH_INDEX=URL        where torch comes from, e.g. https://download.pytorch.org/whl/cpu
#   TEST_PROCESSES=N       test files side by side in `make test`
#   SYSTEM_PROCESSES=N     the same in `make test-system`, whose tests wait half of their time (SLURM, servers)

PYTHON ?= python3
TORCH_INDEX ?=
TEST_PROCESSES ?= 2
SYSTEM_PROCESSES ?= 4

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
TORCH := $(shell grep '^torch==' constraints.txt)

export HF_HUB_OFFLINE := 1
test test-system test-whole test-all: export OMP_NUM_THREADS := 1

.PHONY: help venv vllm demo demo-seeds test test-system test-whole test-all test-gpu lint format bench clean

help:
	@echo "make demo         convert, pretrain, fine-tune, export and ask a small model (2 to 5 minutes)"
	@echo "make demo-seeds   the demo's score on three seeds"
	@echo "make test         unit and CPU tests            make test-system   resume, faults: whole runs"
	@echo "make test-all     all, whole products, GPU      make lint          ruff, mypy, import contracts"
	@echo "make bench        speed against named peers     make venv          prepare .venv only"
	@echo "make vllm         vLLM's CPU build into .venv, for the tests of test-system that need it (2.2 GB more)"

venv: $(READY)

# torch goes first and alone: a CPU wheel is taken where the index has one, and the pins keep it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("mswift needs Python 3.11 or newer; $(PYTHON) is %d.%d: run make PYTHON=python3.11" % v[:2])'
	@echo "preparing $(VENV) with $$($(PYTHON) --version) (minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@$(PIP) install --constraint constraints.txt --editable '.[dev]'
	@touch $@

vllm: $(READY)
	@$(BIN)/python tests/support/install_vllm.py

demo: $(READY)
	@$(BIN)/python configs/demo/run.py

demo-seeds: $(READY)
	@for seed in 1 2 3; do $(BIN)/python configs/demo/run.py --seed $$seed --output_dir demo-output/seed-$$seed || exit 1; done

test: $(READY)
	$(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder tests/unit tests/cpu

test-system: $(READY)
	@if ls tests/system/test_*.py > /dev/null 2>&1; then $(BIN)/python -m pytest --numprocesses $(SYSTEM_PROCESSES) --dist loadfile --no-loadscope-reorder tests/system; \
	else echo "test-system: no tests with real processes yet"; fi

test-gpu: $(READY)
	@if ls tests/gpu/test_*.py > /dev/null 2>&1; then $(BIN)/python -m pytest tests/gpu; \
	else echo "test-gpu: no GPU tests yet"; fi

# Every layout x model x tuner, and many random shapes: hours on two cores.
test-whole: $(READY)
	$(BIN)/python -m pytest tests/unit tests/cpu tests/system -m whole

test-all: export MSWIFT_ALL_FAULTS := 1
test-all: test test-system test-whole test-gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	@for benchmark in benchmarks/*.py; do echo "== $$benchmark"; $(BIN)/python $$benchmark || exit 1; done

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
