# Everything a contributor runs. Each target makes the environment it needs in .venv; a second run finds it made.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?=
BENCH_ARGS ?=
DEMO_ARGS ?=
KILLS ?= 200
MINUTES ?= 30
SEED ?=
SEEDS ?= 1..100
STEPS ?= 10000
EXAMPLES ?= 1000

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Twice quiet: only errors. What a machine is told of its own package sources belongs to nobody here.
install := $(BIN)/python -m pip install --quiet --quiet --constraint constraints.txt --editable

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test fast check coverage simulate fuzz chaos soak format proto bench gpu-check clean distclean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  Variables: PYTHON (3.11 or later), PYTEST_ARGS, DEMO_ARGS, BENCH_ARGS, SEEDS, STEPS, EXAMPLES, KILLS, MINUTES, SEED'

demo: $(VENV)/.demo ## Serve a prompt's prefix from the cache, and show what it saves
	$(BIN)/python -m ops.demo $(DEMO_ARGS)

# One process and one summary: on two cores, tests that start daemons and count on call deadlines of 100 ms are
# not to share the machine with a second pytest.
test: $(VENV)/.dev ## Run every test, one after the other
	$(BIN)/python -m pytest tests $(PYTEST_ARGS)

fast: $(VENV)/.dev ## Run the tests that start no daemon, on two cores
	$(BIN)/python -m pytest -n 2 $(wildcard tests/unit tests/conformance tests/property tests/model tests/repo) $(PYTEST_ARGS)

simulate: $(VENV)/.dev ## Run seeds SEEDS=a..b of the simulated daemon, STEPS=n steps each
	$(BIN)/python -m tests.simulation --seeds $(SEEDS) --steps $(STEPS)

# Without a bound on the time of a test: a thousand examples of one take minutes.
fuzz: $(VENV)/.dev ## Run the fuzz tests with EXAMPLES random examples each
	KVTIER_FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest --timeout=0 tests/fuzz $(PYTEST_ARGS)

check: $(VENV)/.dev ## Lint, format, types, layers, and the rules of tests/repo
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python -m pytest -q tests/repo

# Lines and branches of the core, the protocol and the engine that the tests reach.
coverage: $(VENV)/.dev ## Which lines and branches of core, protocol and engine the tests reach
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest -q -m "not slow" tests $(PYTEST_ARGS)
	$(BIN)/coverage combine -q
	$(BIN)/coverage report

chaos: $(VENV)/.dev ## Kill and stop daemon, agents and workers under load; KILLS, SEED
	$(BIN)/python tests/longrun/chaos.py --kills $(KILLS) $(if $(SEED),--seed $(SEED))

soak: $(VENV)/.dev ## Work, connect and die for MINUTES: nothing may grow
	$(BIN)/python tests/longrun/soak.py --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

format: $(VENV)/.dev ## Reformat the tree and apply the fixes of ruff that are safe
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: ## Regenerate kvstore/v1 from proto/ with the pinned generator
	ops/scripts/gen_proto.sh

bench: $(VENV)/.dev ## Measure a daemon of its own, as ratios to memcpy
	$(BIN)/kvctl bench --spawn $(BENCH_ARGS)

# With whatever Python is there: a machine with a device often has no network, and a torch of its own.
gpu-check: ## Test and measure the hot tier on a CUDA device, offline: make gpu-check [WHEELS=dir] [PYTHON=python3]
	$(PYTHON) ops/scripts/gpu_check.py $(if $(WHEELS),--wheels $(WHEELS)) $(GPU_ARGS)

clean: ## Remove caches and build output
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage* demo.png
	find kvstore client ops tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove the environments too
	rm -rf $(VENV) .venv-proto

# A stamp is written only after the step before it went through, so an interrupted install is taken up again.
$(VENV)/.made:
	@command -v $(PYTHON) >/dev/null || \
	  { echo "$(PYTHON) was not found: install Python 3.11 or later, or name it: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) --version 2>&1); 3.11 or later is needed: make PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: install its venv package (python3-venv on Debian)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.dev: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing kvtier and its tools into $(VENV) (some minutes the first time)"
	@$(install) ".[dev]"
	@touch $@

$(VENV)/.demo: $(VENV)/.made pyproject.toml constraints.txt
	@echo "Installing kvtier and what the demo needs into $(VENV) (some minutes the first time)"
	@$(install) ".[demo]"
	@touch $@
