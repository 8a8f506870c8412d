# Needs python3 (3.10 or newer) and a package index; everything is installed into .venv.
PYTHON ?= python3
BIN := .venv/bin
RUNTIME := .venv/.installed-runtime
DEV := .venv/.installed-dev
# Environments of their own: the newest torch, and litdata, whose torchvision breaks transformers on a CPU build of torch.
NEWEST_TORCH := 2.15.0
NEWEST := .venv-newest/.installed
BENCH := .venv-bench/.installed
# What pip does on one core, on all; some packages ship files that are no Python.
COMPILE := $(BIN)/python -m compileall -qq -j 0 -x '/tests?/' .venv/lib stackgrow || true
# On a GPU machine torch is often there already, in a Python that must not be installed into.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.PHONY: quickstart test test-newest test-slurm test-generated torture fuzz check schema bench-data gpu clean

quickstart: $(RUNTIME)  ## prepare a small corpus and grow a small model on it, on any machine
	$(BIN)/python tools/prepare_data.py --stdlib --train-tokenizer 2048 --out data/stdlib
	$(BIN)/torchrun --standalone --nproc-per-node 1 tools/run_recipe.py recipes/quickstart.toml
	@echo
	@echo "Look at runs/quickstart/report.html. Did growing pay? Its twin from scratch, and the two compared:"
	@echo "  $(BIN)/torchrun --standalone --nproc-per-node 1 tools/run_recipe.py recipes/quickstart_scratch.toml"
	@echo "  $(BIN)/python tools/compare_runs.py runs/quickstart_scratch runs/quickstart --html compared.html"

test: check  ## everything that needs no GPU
	$(BIN)/python -m pytest -m "not gpu and not slurm and not generated" -n 3 --dist loadfile

test-newest: $(NEWEST)  ## the same on the newest torch that is supported: 5.2 GB where there is only its CUDA build
	.venv-newest/bin/python -m pytest -m "not gpu and not slurm and not generated" -n 3 --dist loadfile

gpu:  ## on a machine with a GPU: its tests, then the figures that wait for one; 25 minutes, resumable
	PYTHONPATH=. $(GPU_PYTHON) tools/bench/gpu_day.py

bench-data: $(BENCH)  ## tokens per second of the data path beside torchtitan's and litdata's
	.venv-bench/bin/python tools/bench/data_path.py

torture: $(DEV)  ## 200 kills of complete runs at random moments, 2000 mutated checkpoints; 20 minutes
	STACKGROW_FUZZ=2000 $(BIN)/python -m pytest tests/checkpoint/test_dcp_fuzz.py
	$(BIN)/python tests/e2e/torture.py --kills 200

test-slurm: $(DEV)  ## the Slurm scripts on a real Slurm of one node: apt-get install slurm-wlm, as root; 5 minutes
	$(BIN)/python -m pytest -m slurm tests/e2e/test_slurm_jobs.py

test-generated: $(DEV)  ## Inductor's code for every family, forward and backward: 8 minutes
	$(BIN)/python -m pytest -m generated -rP tests/e2e/test_family_runs.py

check: $(DEV)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fuzz: $(DEV)  ## 10,000 mutated recipes: planned or refused, never a traceback, a hang or a file
	STACKGROW_FUZZ=10000 $(BIN)/python -m pytest -n 2 tests/recipe/test_fuzz_recipes.py

schema: $(RUNTIME)  ## the JSON Schema and the reference in recipes/REFERENCE.md, from the recipe's dataclasses
	$(BIN)/python -m stackgrow.recipe.schema
	$(BIN)/python -m stackgrow.growth.reference

clean:
	rm -rf .venv .venv-newest .venv-bench build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The newest pip, which finds 170 packages in half the time of that of Python 3.11.
$(BIN)/python:
	$(PYTHON) -m venv --upgrade-deps .venv

$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e '.[report]'
	$(COMPILE)
	touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --no-compile -c constraints.txt -e '.[dev]'
	$(COMPILE)
	touch $@ $(RUNTIME)

$(NEWEST): pyproject.toml
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install torch==$(NEWEST_TORCH) -e '.[dev]'
	touch $@

$(BENCH): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install -c constraints.txt -e '.[bench]'
	touch $@
