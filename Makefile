# Every target makes .venv itself when it is missing or when its requirements changed.

PYTHON ?= $(shell for p in python3.11 python3.10 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 12))' \
	2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.ready
TINY := checkpoints/tiny/base.safetensors
DEMO := outputs/demo

.DEFAULT_GOAL := help
.PHONY: help bench bench-runner soak fuzz million demo test test-slow test-full test-ascend lint-mindir check lint format golden oracle clean distclean

help:  ## Say what can be made (the default)
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "error: Python 3.10 or 3.11 is needed; hint: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c requirements.lock -e '.[test,lint]'
	@touch $@

$(TINY): | $(READY)
	$(BIN)/python -m sdxl.random_weights --preset tiny --dtype fp16 $@

demo: $(READY) $(TINY)  ## Make the pictures of manifests/demo.csv on two CPU workers
	$(BIN)/sdxl-jobs run manifests/demo.csv --config configs/tiny.yaml --workers 2 --output $(DEMO)
	$(BIN)/sdxl-jobs sheet $(DEMO) --columns 8

test: $(READY) $(TINY)  ## Run the tests (minutes)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(READY) $(TINY)  ## Run the tests that take long
	$(BIN)/python -m pytest -m slow

lint-mindir: $(READY)  ## Hold every graph, in its form for a card, to what a card can run (minutes)
	$(BIN)/python tests/sdxl/mindir_lint.py --report docs/ascend.md
	$(BIN)/python tests/sdxl/half_precision.py --report docs/ascend.md

test-ascend: $(READY)  ## The tests that need a card
	$(BIN)/python -m pytest -m ascend -n 0 -s tests/sdxl/test_on_card.py

test-full: $(READY)  ## Run the full-size network once on the CPU (16 GB of memory, 7 GB of disk)
	$(BIN)/python -m pytest -m full -s

soak: $(READY)  ## Kill 200 jobs at bad moments and resume them (an hour)
	$(BIN)/python tests/jobs/soak.py --runs 200 --report docs/reliability.md

fuzz: $(READY)  ## Feed 100,000 damaged files to every reader (minutes)
	$(BIN)/python tests/jobs/fuzz.py --cases 100000 --report docs/reliability.md

million: $(READY)  ## Run a job of a million tasks without a network (half an hour)
	$(BIN)/python tests/jobs/million.py --report docs/reliability.md

bench-runner: $(READY)  ## What the runner adds to eight devices' time (four minutes)
	$(BIN)/python tests/bench/off_the_clock.py --report docs/runner.md

bench: $(READY)  ## Compare the full-size UNet's step and a whole job with diffusers (`make oracle` first; 24 GB of memory, a quarter of an hour)
	$(BIN)/python -m tests.bench.unet_step
	$(BIN)/python -m tests.bench.second_start
	$(BIN)/python -m tests.bench.job

lint: $(READY)  ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## Mend style and formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

check: lint test  ## Everything that must pass before a commit

oracle: $(READY)  ## Install diffusers, transformers, k-diffusion and torch for the live comparisons
	$(BIN)/python -m pip install --quiet -c requirements.lock torch==2.13.0
	$(BIN)/python -m pip install --quiet -c requirements.lock -e '.[oracle]'
	$(BIN)/python -m pip install --quiet --no-deps k-diffusion==0.1.1.post1

clean:  ## Remove what the demo and the tests made
	rm -rf $(DEMO) rank_0 .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## Remove .venv too
	rm -rf .venv
