# Every target makes .venv first when it is not there, and uses it after: from requirements.lock where pip is
# configured to offer the CPU build of torch, else from requirements-cuda.lock (LOCK=… decides it).
PYTHON ?= python3
LOCK ?=
ARGS ?=
BIN := .venv/bin
PACKAGES := qformer pipelines jobs cluster
STAMP := .venv/.installed
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

# The environment is installed without bytecode, and what is used gets it on first import. Where this variable forbids
# that, each of a job's dozen processes would compile torch and Ray anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo demo-video demo-full test test-slow test-all lint format bench docs clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): requirements.lock requirements-cuda.lock pyproject.toml
	@$(PYTHON) -c 'import platform, sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) or \
	    (platform.system(), platform.machine()) != ("Linux", "x86_64"))' || \
	    { echo "error: the locks hold wheels for Python 3.11 and 3.12 on Linux x86_64, and $(PYTHON) is another; name" \
	    "one: make PYTHON=python3.12 …, or see The environment in docs/contributing.md" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@lock="$(LOCK)"; torch="$$(grep -o '^torch==[^ ]*' requirements.lock)"; \
	if [ -z "$$lock" ]; then \
	    $(PIP) install --dry-run --ignore-installed --no-deps --report - "$$torch" 2>/dev/null | grep -q '+cpu' \
	        && lock=requirements.lock || lock=requirements-cuda.lock; \
	fi; \
	echo "making .venv from $$lock, which takes some minutes the first time"; \
	$(PIP) install --no-compile --require-hashes -r "$$lock"
	@$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP) ## the whole road on a small world: prepare, train, evaluate, serve (ARGS="--set demo.retrain=true")
	@$(BIN)/qformer demo $(ARGS)

demo-video: $(STAMP) ## the demo, and then clips whose captions need the order of their frames, and sound
	@$(BIN)/qformer demo --video $(ARGS)

demo-full: $(STAMP) ## the same with more data and steps
	@$(BIN)/qformer demo --config jobs/configs/examples/demo_full.yaml $(ARGS)

test: $(STAMP) ## the tests, without the long drills, in two processes
	@$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

test-slow: $(STAMP) ## only the tests that `make test`, and with it CI, leaves out
	@$(BIN)/python -m pytest -m slow $(ARGS)

test-all: $(STAMP) ## all tests that this machine can run
	@$(BIN)/python -m pytest -m "" $(ARGS)

lint: $(STAMP) ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(STAMP) ## rewrite the code in the project's format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

bench: $(STAMP) ## every benchmark (ARGS=--json for machine-readable last lines)
	@$(BIN)/python -m jobs.bench $(ARGS)

docs: $(STAMP) ## this project's pages as a site in site/; a warning is an error
	@$(BIN)/python docs/generate.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

clean: ## remove the demo's output and caches, keep .venv and runs
	@rm -rf demo-out demo-out-full build site ./*.egg-info .mypy_cache .pytest_cache .ruff_cache
	@find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove .venv too
	@rm -rf .venv
