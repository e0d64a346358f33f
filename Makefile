# Every target sets up what it needs; only Python >= 3.11, git and make are assumed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint typecheck check wheel smoke clean

demo: $(VENV)/.installed
	@$(BIN)/gmsa pull
	@$(BIN)/python examples/demo.py

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(VENV)/.installed-dev
	$(BIN)/mypy

check: lint typecheck test

wheel: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist .

# The wheel in an environment of its own, as a user gets it.
smoke: wheel
	rm -rf $(VENV)-smoke
	$(PYTHON) -m venv $(VENV)-smoke
	scripts/install_torch.sh $(VENV)-smoke/bin/python
	$(VENV)-smoke/bin/python -m pip install -q dist/*.whl
	scripts/smoke.sh $(VENV)-smoke/bin

clean:
	rm -rf $(VENV) $(VENV)-smoke dist build

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "GMSA needs Python 3.11 or newer: make PYTHON=python3.12 ..."; exit 1)
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml scripts/install_torch.sh
	scripts/install_torch.sh $(BIN)/python
	$(BIN)/python -m pip install -q -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@
