# Every target installs what it needs into .venv first (no system package without INSTALL=1 or CI=true).
.DEFAULT_GOAL := help
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := .tools/uv/bin/uv
STAMP := $(VENV)/.installed
# What is imported again and again: by engines, by the command, by tests.
COMPILED := kvpilot_engine.server.lifecycle, kvpilot_engine.engine, kvpilot_operator.local.command, \
            kvpilot_operator.service, transformers.models.llama.modeling_llama, \
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
	@# Imported once where bytecode is kept: where Python may write none, each start of an engine took 20 s, not 8.
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -c 'import $(COMPILED)'
	@touch $@

.PHONY: install
install: $(STAMP) ## Install everything into .venv

.PHONY: demo
demo: $(STAMP) ## Breach, diagnosis, cure: a whole tuning decision on this machine, about four minutes
	@$(BIN)/kvpilot up examples/quickstart.yaml --load chat --check $(ARGS)

.PHONY: test
test: programs ## Everything: lint, all tests, the real control plane included
	@# The type checker uses one core and has half a minute to spare beside the first tests.
	@$(MAKE) --no-print-directory -j2 lint test-local
	@$(MAKE) --no-print-directory test-e2e

.PHONY: programs
programs: $(STAMP) ## Build Prometheus, Helm and the control plane from source (minutes, once; cached)
	@# Where that cannot be, the tests that need one of them say so and are skipped; CI must have them all.
	@$(BIN)/python -m scripts.cluster build || [ "$$CI" != true ]

.PHONY: test-unit
test-unit: $(STAMP) ## The fast tests
	@$(BIN)/python -m scripts.tests unit $(ARGS)

.PHONY: test-local
test-local: $(STAMP) ## All tests that need no control plane
	@$(BIN)/python -m scripts.tests local $(ARGS)

.PHONY: test-e2e
test-e2e: $(STAMP) ## The tests on a real control plane (started for them, and stopped)
	@$(BIN)/python -m scripts.tests e2e $(ARGS)

.PHONY: lint
lint: $(STAMP) ## ruff, mypy (strict), import-linter
	@$(BIN)/ruff format --check --quiet . && $(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

.PHONY: verify
verify: $(STAMP) ## Regenerate definitions and reference pages; fails when one of them had drifted
	@$(BIN)/python -m kvpilot_operator.crd --check

.PHONY: generate
generate: $(STAMP) ## Write definitions and reference pages anew
	@$(BIN)/python -m kvpilot_operator.crd

.PHONY: bench
bench: $(STAMP) ## The benchmarks; results go to bench/results
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
cluster-down: $(STAMP) ## Stop it and leave nothing behind
	@$(BIN)/python -m scripts.cluster down
