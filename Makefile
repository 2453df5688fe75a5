# Everything lives in .venv at the root; every target but clean starts by making sure it is there and complete.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test test-api test-faults fuzz benchmark monitoring docs lint format types clean

setup: $(STAMP)

# torch comes first and exactly: any looser requirement takes whatever is newest. TORCH_INDEX names a wheel index
# for another build of the same version (https://download.pytorch.org/whl/cpu or …/cu130).
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; set PYTHON=python3.x"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "torch==$$(sed -n 's/^torch==//p' constraints.txt)" -c constraints.txt
	$(BIN)/pip install --quiet -e '.[dev]' -c constraints.txt
	@touch $@

# DEMO takes its options: make demo DEMO="--examples 40"
demo: $(STAMP)
	$(BIN)/python -m examples.demo $(DEMO)

# A file's tests stay together: what they share is made once.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile

# CONTRACT takes its options: make test-api CONTRACT="--seed 7"
test-api: $(STAMP)
	$(BIN)/python -m tests.contract $(CONTRACT)

# 100 000 damaged source files: about three minutes of computing.
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz

benchmark: $(STAMP)
	$(BIN)/python -m benchmarks.speed --quick

# What Prometheus and Grafana import, from docs/operations.md and the metrics.
monitoring: $(STAMP)
	$(BIN)/python -m deploy.monitoring

# Links and anchors that lead nowhere, and pages that nothing leads to, are errors.
docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs site

# FAULTS takes its options: make test-faults FAULTS="--seed 7"
test-faults: $(STAMP)
	$(BIN)/python -m tests.faults $(FAULTS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
