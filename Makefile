# Two commands on a fresh machine: `make demo` and `make test`. Both set themselves up in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Beside the environment: torchao slows every import of transformers down, and prints messages while it does.
QUANTISED := $(VENV)/quantised
QUANTISED_TESTS := tests/test_quantised.py tests/training/test_qlora.py tests/test_readme.py

LMMS_VENV := .venv-lmms
LMMS_INSTALLED := $(LMMS_VENV)/.installed
# What lmms-eval's evaluator imports. It requires much more, such as a torchvision, of which the CPU's torch has none.
LMMS_NEEDS := pytest datasets evaluate loguru numexpr pytablewriter python-dotenv sacrebleu tenacity

.PHONY: demo test test-lmms lint format toy bench clean

demo: $(INSTALLED)
	$(BIN)/python examples/demo.py

test: $(INSTALLED) $(QUANTISED) lint
	PYTHONPATH=$(abspath $(QUANTISED)) $(BIN)/python -m pytest $(QUANTISED_TESTS) -k "quantised or qlora"
	$(BIN)/python -m pytest

test-lmms: $(LMMS_INSTALLED)
	$(LMMS_VENV)/bin/python -m pytest tests_lmms

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

toy: $(INSTALLED)
	$(BIN)/python -m etchat_hf.toy

bench: $(INSTALLED) $(QUANTISED)
	$(BIN)/python benchmarks/run.py

$(INSTALLED): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "etchat_hf needs Python 3.11 or newer: make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

$(QUANTISED): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps --target $@ torchao bitsandbytes
	@touch $@

$(LMMS_INSTALLED): setup.py constraints-lmms.txt
	$(PYTHON) -m venv $(LMMS_VENV)
	$(LMMS_VENV)/bin/python -m pip install --quiet --constraint constraints-lmms.txt --editable . $(LMMS_NEEDS)
	$(LMMS_VENV)/bin/python -m pip install --quiet --constraint constraints-lmms.txt --no-deps lmms-eval
	@touch $@

clean:
	rm -rf $(VENV) $(LMMS_VENV) out build *.egg-info
