# Everything a checkout needs, from an environment of its own in .venv. `make` alone lists the targets.
#
#   PYTHON   interpreter that .venv is made from (3.10 or newer)
#   TORCH    what pip installs as torch, e.g. a wheel's path; the default is the range in pyproject.toml
#   MODEL    model of `make run` and `make serve`
#   PROMPT   question of `make run`: answers it and exits
#   TESTS    what `make test` and `make test-slow` run, e.g. TESTS=tests/checkpoint
#   ARGS     passed on to `ernie up` by `make serve`, to benchmarks/generate.py by `make bench`

PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= $(shell sed -n 's/^ *"\(torch[<>=][^"]*\)".*/\1/p' pyproject.toml)
MODEL  ?= smollm2-135m
TESTS  ?= tests
ARGS   ?=

# The folders whose tests need no network forward passes: below a minute together. `make test` runs everything.
CHECK_TESTS := $(wildcard tests/config tests/kernels tests/processing tests/checkpoint tests/test_packaging.py)

# The user's words reach the shell through the environment, never through the recipe's text: $, quotes and spaces survive.
override PROMPT := $(value PROMPT)
export PROMPT MODEL TORCH
# Spinning worker threads of OpenMP steal the second core from everything else; an own setting is kept.
OMP_WAIT_POLICY ?= passive
export OMP_WAIT_POLICY

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# What an editable install depends on; Python files are used in place.
BUILD_INPUTS := pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: help run serve test test-slow check format bench clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|' 2>/dev/null \
	  || sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1    \2/p' Makefile
	@sed -n 's/^#   \([A-Z]*\)  */  \1=...  /p' Makefile

run: $(VENV)/.installed-run  ## answer a prompt with the default model, then chat: make run [PROMPT="..."] [MODEL=...]
	@if $(BIN)/ernie show "$$MODEL" >/dev/null 2>&1; then echo "[model]   $$MODEL is here"; \
	  else echo "[model]   fetching $$MODEL"; $(BIN)/ernie pull "$$MODEL"; fi
	@if [ -n "$$PROMPT" ]; then \
	  echo "[chat]    $$MODEL answers PROMPT"; \
	  exec $(BIN)/ernie chat "$$MODEL" -- "$$PROMPT" </dev/null; \
	else \
	  echo "[chat]    $$MODEL answers: What is the capital of France?"; \
	  $(BIN)/ernie chat "$$MODEL" "What is the capital of France?" </dev/null && \
	  if [ -t 0 ]; then echo "[chat]    your turn"; exec $(BIN)/ernie chat "$$MODEL"; fi; \
	fi

serve: $(VENV)/.installed-run  ## serve the default model with its chat page: make serve [MODEL=...] [ARGS="--port 8080"]
	@exec $(BIN)/ernie up "$$MODEL" $(ARGS)

test: $(VENV)/.installed-test  ## run the default tests: no GPU, no network
	@echo "[test]    $(TESTS)"
	@$(BIN)/python -m pytest $(TESTS)

test-slow: $(VENV)/.installed-slow  ## run the slow tests, those that use the network included
	@echo "[test]    $(TESTS), slow ones"
	@$(BIN)/python -m pytest $(TESTS) -m "(slow or network) and not gpu"

check: $(VENV)/.installed-dev  ## formatting, lint, types and the fast tests
	@echo "[format]  ruff format --check"
	@$(BIN)/ruff format --check --quiet . || { echo "          run: make format"; exit 1; }
	@echo "[lint]    ruff check"
	@$(BIN)/ruff check --quiet .
	@echo "[types]   mypy --strict"
	@$(BIN)/mypy
	@echo "[test]    $(CHECK_TESTS)"
	@$(BIN)/python -m pytest -x -q $(CHECK_TESTS)

format: $(VENV)/.installed-dev  ## format the code and apply the safe fixes of the linter
	@echo "[format]  ruff format, ruff check --fix"
	@$(BIN)/ruff check --quiet --fix-only .
	@$(BIN)/ruff format .

bench: $(VENV)/.installed-bench  ## measure load time, memory and tokens per second: make bench [ARGS="..."]
	@echo "[bench]   benchmarks/generate.py"
	@$(BIN)/python benchmarks/generate.py $(ARGS)

clean:  ## remove caches and build results; .venv and downloaded models stay
	@echo "[clean]   caches, build/, dist/, install stamps"
	@rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis $(VENV)/.installed-*
	@find ernie45 tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(f"Python {v[0]}.{v[1]} is too old, ernie45 needs 3.10 or newer: make PYTHON=python3.12 ..." if v < (3, 10) else 0)'
	@echo "[venv]    $(VENV) from $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV)
	@touch $@

# $(call install,stamp,requirement,other stamps that this one satisfies)
define install
	@echo "[install] $$TORCH (some 200 MB the first time)"
	@$(PIP) install "$$TORCH"
	@echo "[install] $(2), editable, with the native extension"
	@$(PIP) install --editable "$(2)"
	@$(BIN)/python -c 'from ernie45.kernels.native import status; s = status(); print("[native] ", s.reason); s.remedy and print("         ", s.remedy)'
	@touch $(addprefix $(VENV)/.installed-,$(1) $(3))
endef

$(VENV)/.installed-run: $(BUILD_INPUTS) | $(VENV)/.created
	$(call install,run,.)
$(VENV)/.installed-test: $(BUILD_INPUTS) | $(VENV)/.created
	$(call install,test,.[test],run)
$(VENV)/.installed-dev: $(BUILD_INPUTS) | $(VENV)/.created
	$(call install,dev,.[dev],test run)
$(VENV)/.installed-slow: $(BUILD_INPUTS) | $(VENV)/.created
	$(call install,slow,.[slow],test run)
$(VENV)/.installed-bench: $(BUILD_INPUTS) | $(VENV)/.created
	$(call install,bench,.[bench],test run)
