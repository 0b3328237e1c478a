# Everything goes through here; CI calls `make test`. Nothing has to be installed before but Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := $(VENV)/oldest-transformers
EMPTY := $(VENV)/empty
TWO := --numprocesses 2 --dist loadfile  # one process per core of the CI machine

.PHONY: demo test check docs dist install lint clean

demo: install  ## answer a question on a long text, the cache over 2 processes, checked against one process
	$(BIN)/python scripts/smollm2.py --text $(VENV)/topics.txt
	$(BIN)/tree-attention generate --model "$$($(BIN)/python scripts/smollm2.py)" --file $(VENV)/topics.txt \
		--max-prompt-tokens 4000 --prompt "What is this text about? Answer in one sentence." --nproc 2 --verify

test: check $(OLDEST)/installed  ## everything: what `check` does, the slow tests, and the oldest transformers we support
	$(BIN)/python -m pytest $(TWO) -m "slow or model"
	PYTHONPATH=$(OLDEST) $(BIN)/python -m pytest $(TWO) tests/test_hf_*.py tests/test_session.py tests/test_tensor_parallel.py \
		-m "not model" -k "not slow or (every_architecture and 3-)"
	$(MAKE) docs dist

check: install lint  ## format, lint, types, fast tests
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile -m "not slow and not model"

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --min-severity error

docs: install  ## the documentation site, in docs/_build/html; a warning is an error
	$(BIN)/python -m sphinx -q -E -W --keep-going -b html docs docs/_build/html

dist: install  ## sdist and wheel, checked; the wheel alone runs the command and the core example
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(MAKE) $(EMPTY)/installed
	$(EMPTY)/bin/python -m pip install --quiet --force-reinstall --no-deps dist/*.whl
	$(EMPTY)/bin/tree-attention info
	$(EMPTY)/bin/python -m tree_attention info --json
	$(EMPTY)/bin/torchrun --nproc-per-node 2 examples/decode.py

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	touch $@

$(EMPTY)/installed: pyproject.toml constraints.txt  # a fresh environment whenever the dependencies may have changed
	$(BIN)/python -m venv --clear $(EMPTY)
	$(EMPTY)/bin/python -m pip install --quiet --no-compile --constraint constraints.txt dist/*.whl
	touch $@

$(OLDEST)/installed: Makefile | install
	$(BIN)/python -m pip install --quiet --no-compile --upgrade --no-deps --target $(OLDEST) \
		transformers==5.17.0 huggingface-hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
	touch $@

clean:
	rm -rf $(VENV)
