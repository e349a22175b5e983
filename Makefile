# Every target installs what it needs into .venv first (no system package without INSTALL=1 or CI=true).
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := .tools/uv/bin/uv
STAMP := $(VENV)/.installed
# Modules that engines, the command and tests import at every start.
COMPILED := kvpilot_engine.server.lifecycle, kvpilot_engine.core.engine, kvpilot_operator.local.command, \
            kvpilot_operator.cluster.service, transformers.models.llama.modeling_llama, \
            transformers.models.qwen3.modeling_qwen3, openai, hypothesis, pytest, rich.live
export UV_PROJECT_ENVIRONMENT := $(VENV)

.PHONY: help
help: ## Show this help
	@echo "kvpilot: make targets"
	@grep -hE '^[a-z][a-z-]*:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# uv itself lives outside the environment that it manages.
$(UV):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kvpilot needs Python 3.11 or later; set PYTHON=..."; exit 2; }
	@echo "installing uv"
	@$(PYTHON) -m venv .tools/uv && .tools/uv/bin/python -m pip install --quiet --disable-pip-version-check uv

$(STAMP): pyproject.toml uv.lock | $(UV)
	@echo "installing the locked dependencies into $(VENV) (several GiB the first time)"
	@$(UV) sync --quiet --locked --extra dev --python $$($(PYTHON) -c 'import sys; print(sys.executable)')
	@# Compile once: where Python may write no bytecode, each start of an engine took 20 s instead of 8 s.
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c 'import $(COMPILED)'
	@touch $@

.PHONY: install
install: $(STAMP) ## Install the locked dependencies into .venv

.PHONY: demo
demo: $(STAMP) ## One tuning decision on this machine, from breach to cure, in about four minutes
	@$(BIN)/kvpilot up examples/quickstart.yaml --load chat --check $(ARGS)

.PHONY: test
test: programs ## Lint and all tests; INSTALL=1 installs what a real control plane needs, and then nothing is skipped
	@# The type checker uses one core and ends long before the tests do.
	@$(MAKE) --no-print-directory -j2 lint test-local
	@$(MAKE) --no-print-directory test-e2e

.PHONY: programs
programs: $(STAMP) ## Build Prometheus, Helm and the control plane from source (minutes, once; cached)
	@# With INSTALL=1 or CI=true a failure here ends the run; otherwise the tests that need one are skipped.
	@$(BIN)/python -m scripts.tests programs

.PHONY: test-unit
test-unit: $(STAMP) ## Run the fast tests
	@$(BIN)/python -m scripts.tests unit $(ARGS)

.PHONY: test-local
test-local: $(STAMP) ## Run all tests that need no control plane
	@$(BIN)/python -m scripts.tests local $(ARGS)

.PHONY: test-e2e
test-e2e: $(STAMP) ## Run the tests on a real control plane, which is started for them and stopped
	@$(BIN)/python -m scripts.tests e2e $(ARGS)

.PHONY: lint
lint: $(STAMP) ## Run ruff, mypy (strict) and import-linter
	@$(BIN)/ruff format --check --quiet . && $(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

.PHONY: verify
verify: $(STAMP) ## Check that definitions and reference pages are up to date
	@$(BIN)/python -m scripts.generate --check

.PHONY: generate
generate: $(STAMP) ## Write definitions and reference pages
	@$(BIN)/python -m scripts.generate

.PHONY: bench
bench: $(STAMP) ## Run the benchmarks; results go to bench/results
	@$(BIN)/python -m bench $(ARGS)

.PHONY: images
images: $(STAMP) ## Build both images without a Docker engine (the engine's is several GiB)
	@$(BIN)/python -m scripts.images all

.PHONY: manifests
manifests: $(STAMP) ## Render dist/install.yaml from the chart
	@$(BIN)/python -m scripts.manifests

.PHONY: cluster-up
cluster-up: $(STAMP) ## A real control plane: kind where Docker runs, else built from source (minutes, once)
	@$(BIN)/python -m scripts.cluster up

.PHONY: cluster-down
cluster-down: $(STAMP) ## Stop it and leave only the cache behind
	@$(BIN)/python -m scripts.cluster down
