# Everything starts here: `make demo` and `make test` set up their own environment in .venv first.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
DATA ?=
REAL ?=
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.DEFAULT_GOAL := help
.PHONY: help demo page test campaign lint install clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  DATA=<folder>    run the demo on your own recordings:  make demo DATA=recordings"
	@echo "  REAL=1           with published parts:                 make demo REAL=1 DATA=recordings"
	@echo "  ARGS='...'       more arguments for demo or test:      make test ARGS='-k codec'"
	@echo "  PYTHON=...       the Python to build .venv with:       make test PYTHON=python3.12"
	@echo "  CONSTRAINTS=     newest versions, not the tested ones: make test CONSTRAINTS="

demo: $(READY) ## speech -> tokens -> language model -> text, from nothing to a word error rate
	$(BIN)/python recipes/demo.py --config configs/demo$(if $(REAL),_real,$(if $(DATA),_data)).yaml $(if $(DATA),data="$(DATA)") $(ARGS)

page: $(READY) ## speak to the demo's model in a browser
	$(BIN)/speechllm page runs/demo/asr/model $(ARGS)

test: $(READY) ## run all tests (no network, no GPU needed)
	$(BIN)/python -m pytest -q --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder $(ARGS)

campaign: $(READY) ## kills and hostile files, about 25 minutes: see tests/README.md
	$(BIN)/python tests/campaign $(ARGS)

lint: $(READY) ## ruff (rules and format) and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

install: $(READY) ## only set up .venv
	@echo "ready: source $(VENV)/bin/activate, and speechllm, accelerate and python are those of $(VENV)"

# Made once, and again when the dependencies change.
$(READY): pyproject.toml $(CONSTRAINTS)
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "$(PYTHON) was not found. Install Python 3.11 or newer, or name one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "$(PYTHON) is $$("$(PYTHON)" --version 2>&1); Python 3.11 or newer is needed." \
			"Name another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) has no venv module. On Debian or Ubuntu: sudo apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -c '' 2>/dev/null || { echo "making $(VENV) with $$("$(PYTHON)" --version)"; "$(PYTHON)" -m venv --clear $(VENV); }
	@echo "installing speechllm and its dependencies into $(VENV): about 2 minutes and 6 GB when it is new"
	@$(PIP_INSTALL) -e ".[eval,demo,align,page,serve,vad,dev]" || { \
		echo "That did not work; the usual reason is pesq or pyworld, which need a C compiler and the Python headers." \
			"Trying without them: neither PESQ nor prosody will be measured." >&2; \
		$(PIP_INSTALL) -e ".[demo,align,page,serve,vad,dev]" pystoi whisper-normalizer; }
	@touch $(READY)

clean: ## remove build results and caches (keeps .venv and runs)
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find speechllm tokenizer recipes tests -name __pycache__ -type d -prune -exec rm -rf {} +
