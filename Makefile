# Everything lives in $(VENV); nothing global is installed or written.
#   make demo                           train eight adapters, serve them in one mixed batch
#   make test                           the whole suite
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu    on a machine without a GPU

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
MUTANTS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
PROTO_DIR := protos/loramux_protos/v1
PROTOS := $(wildcard $(PROTO_DIR)/*.proto)
SERVICE_PROTOS := $(shell grep -l '^service ' $(PROTOS))

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev demo test mutants fuzz bench format protos client clean lint lint-style lint-types lint-imports lint-protos lint-client lint-docker

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

setup: $(VENV)/.loramux-run ## Virtual environment with everything that runs

setup-dev: $(VENV)/.loramux-dev ## The same with test and lint tools

# torch comes first and alone: its wheel (CPU, or CUDA with gigabytes of libraries) is the machine's choice.
$(VENV)/.loramux-torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Loramux needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo 'Installing torch $(TORCH) into $(VENV) ...'
	@$(PIP) install --quiet --no-deps torch==$(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@$(PIP) install --quiet --constraint constraints.txt hatchling
	@touch $@

$(VENV)/.loramux-run: $(VENV)/.loramux-torch pyproject.toml
	@echo 'Installing Loramux and what it runs on ...'
	@$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[serve,train,bench]'
	@touch $@

$(VENV)/.loramux-dev: $(VENV)/.loramux-torch pyproject.toml
	@echo 'Installing Loramux with its test and lint tools ...'
	@$(PIP) install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	@touch $@ $(VENV)/.loramux-run

demo: setup ## Train adapters, serve them together, print what came of it
	$(BIN)/loramux demo

test: setup-dev ## The test suite
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

mutants: setup-dev ## Put faults into copies of the tree; a test must notice each (MUTANTS='words of some')
	$(BIN)/python tests/mutants $(MUTANTS)

fuzz: setup-dev ## Read adapters that were changed at random (FUZZ='--rounds N --seed N')
	$(BIN)/python tests/fuzz $(FUZZ)

bench: setup-dev ## Mixed batches against base only, and against PEFT
	$(BIN)/loramux bench $(BENCH_ARGS)

lint: lint-style lint-types lint-imports lint-protos lint-client lint-docker ## Everything CI checks besides the tests

lint-style: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-types: setup-dev
	$(BIN)/mypy

lint-imports: setup-dev
	$(BIN)/lint-imports --no-cache --no-logo

lint-protos: setup-dev
	$(BIN)/buf lint protos
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && $(MAKE) --no-print-directory protos OUT="$$fresh" && \
	for stub in "$$fresh"/loramux_protos/v1/* $(PROTO_DIR)/*_pb2*; do \
	  cmp "$$fresh/loramux_protos/v1/$${stub##*/}" "$(PROTO_DIR)/$${stub##*/}" || { echo 'stubs are stale: run make protos'; exit 1; }; \
	done

lint-client: setup-dev
	@$(BIN)/python client/unasync_client.py | cmp - client/loramux/client.py || { echo 'client.py is stale: run make client'; exit 1; }

lint-docker: setup-dev
	$(BIN)/hadolint Dockerfile

format: setup-dev ## Rewrite the sources as the linters want them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python client/unasync_client.py --write

protos: OUT := protos
protos: setup-dev ## Generate the stubs again
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I protos --python_out=$(OUT) --mypy_out=quiet:$(OUT) $(PROTOS)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I protos --grpc_python_out=$(OUT) --mypy_grpc_out=quiet:$(OUT) $(SERVICE_PROTOS)

client: setup-dev ## Write the synchronous client from the asyncio one
	$(BIN)/python client/unasync_client.py --write

clean: ## Remove the virtual environment and every cache
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
