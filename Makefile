# Every target makes .venv first where there is none. `make help` lists the targets.
SHELL := /bin/bash
PYTHON ?= python3
SCALE ?= demo

PY := .venv/bin/python
READY := .venv/.installed
TESTS := .venv/.tests
WORKERS ?= auto
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --maxprocesses 4 --dist worksteal
PAPERS := leask oneill minder paulo song
BENCHMARKS := bench_train_step bench_stream bench_fleet bench_scaling bench_stacked bench_stitching bench_quality
ALL := $(basename $(notdir $(foreach paper,$(PAPERS),$(sort $(wildcard conf/experiment/$(paper)_*.yaml)))))
EXPERIMENTS := $(filter-out $(WITHOUT),$(ALL))

.DEFAULT_GOAL := help
.PHONY: help demo test test-all check report bench peers clean reproduce-all $(PAPERS:%=reproduce-%)

help: ## this list
	@grep -hE '^[a-z<>-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 22
	@printf 'reproduce-<paper>     all experiments of one paper: %s (SCALE=demo|paper, WITHOUT="experiments to leave out")\n' '$(PAPERS)'

demo: $(READY) ## the main experiment on the bundled model, then the report: minutes on a laptop, no network
	@status=0; HF_HUB_OFFLINE=1 $(PY) run.py experiment=leask_batchtopk scale=demo || status=$$?; \
	$(PY) -m reports.compare || status=$$?; exit $$status

test: $(TESTS) ## the tests that a change is likely to break: at most 10 minutes on two cores (WORKERS=n processes)
	$(PYTEST) -m "not slow"

test-all: test ## those, then the slow ones: kills, paper sizes, whole demos; at most 45 minutes on two cores
	$(PYTEST) -m slow

check: $(READY) ## format, lint and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

report: $(READY) ## compare all results in outputs/ with the papers' claims
	$(PY) -m reports.compare

reproduce-all: $(READY) ## all experiments of all papers (SCALE=demo|paper), one process each, then the report
	@$(call run_each,$(EXPERIMENTS))

$(PAPERS:%=reproduce-%): reproduce-%: $(READY)
	@$(call run_each,$(filter $*_%,$(EXPERIMENTS)))

bench: $(READY) ## all benchmarks but bench_hours (SCALE=demo|paper), then the report; `make peers` first for the other libraries
	@$(call run_each,$(BENCHMARKS))

peers: .venv-peers/.installed ## a second environment with the libraries that the benchmarks compare with: minutes, 2 GB

.venv-peers/.installed: requirements-peers.lock
	@$(PYTHON) -m venv --clear .venv-peers
	@.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-peers.lock
	@touch $@

# A failing experiment does not stop the others; it is named at the end, and the target fails.
define run_each
	test -n "$(strip $(1))" || { echo "error: no experiment yet for $@ (see conf/experiment)" >&2; exit 1; }; \
	failed=; for name in $(1); do \
		echo "== $$name, $(SCALE) scale" >&2; \
		$(PY) run.py experiment=$$name scale=$(SCALE) || failed="$$failed $$name"; \
	done; \
	$(PY) -m reports.compare || failed="$$failed report"; \
	test -z "$$failed" || { echo "error: failed:$$failed" >&2; exit 1; }
endef

clean: ## remove .venv, .venv-peers and caches; results (outputs/) and what was trained (artifacts/) stay
	rm -rf .venv .venv-peers .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: Python 3.11 or newer is needed ($(PYTHON) is older or missing): make PYTHON=python3.11 ..." >&2; exit 1; }
	@echo "making .venv: downloads and installs what requirements.lock names, a few minutes the first time" >&2
	@$(PYTHON) -m venv .venv
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

# Apart from requirements.lock: the bundled corpus is made of what that file names.
$(TESTS): requirements-tests.lock $(READY)
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-tests.lock
	@touch $@
