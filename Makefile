# `make demo` and `make test` work on a fresh machine. Everything is installed into .venv.

PYTHON ?= python3
FASHION_MNIST ?=
DEMO ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := torch==2.11.0 torchvision==0.26.0
# pytest-xdist 3.8 may wait for ever at the end once it has replaced a worker that died
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --max-worker-restart 0
CHECKED := ijepa_scale kernels launch benchmarks tests setup.py docs/.site

.PHONY: help install demo docs test test-all test-ci cluster-packages test-versions lint clean
.DEFAULT_GOAL := help

help: ## Show this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

install: $(STAMP) ## Make .venv and install the package into it (PYTHON=python3.12 picks another Python)

# Install torch and torchvision first, because DeepSpeed's setup imports torch. DS_BUILD_OPS=0 builds no DeepSpeed ops.
$(STAMP): setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(not (3, 10) <= v <= (3, 13))' 2>/dev/null \
		|| { echo "$(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo not installed); Python 3.10 to 3.13 is needed: make $(or $(firstword $(MAKECMDGOALS)),install) PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
		|| { echo "$(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q --upgrade pip 'setuptools>=77,<81' wheel
	$(BIN)/python -m pip install --disable-pip-version-check -q $(TORCH)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --disable-pip-version-check -q --no-build-isolation -e '.[test]'
	@touch $(STAMP)

demo: $(STAMP) ## Pretrain on Fashion-MNIST with ZeRO-3 on 2 CPU processes, or on your GPUs (FASHION_MNIST=folder DEMO=settings)
	$(BIN)/python launch/demo.py $(if $(FASHION_MNIST),--fashion-mnist '$(FASHION_MNIST)') $(DEMO)

docs: $(STAMP) ## Write docs/configuration.md, configs/schema/ and the table of completion, and build the site into site/
	$(BIN)/python -m ijepa_scale.config.manual
	$(BIN)/python -m ijepa_scale.completion.known
	@$(BIN)/python -c 'import mkdocs, material, mkdocstrings' 2>/dev/null \
		|| { echo "the site needs the extra docs: $(BIN)/python -m pip install -e '.[docs]' --no-build-isolation" >&2; exit 2; }
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

lint: $(STAMP) ## Check style and types
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/mypy

SHORT ?= -m "not long"

test: lint ## Check style and types, then run the tests
	$(PYTEST) $(SHORT) -n 2 --dist loadfile tests/unit tests/lowering $(wildcard tests/parity)
	$(if $(wildcard tests/distributed),$(PYTEST) $(SHORT) -n 2 tests/distributed $(wildcard tests/cluster) tests/golden)

test-versions: $(STAMP) ## Try the wheel under Python 3.10 to 3.13 and PyTorch 2.11 to 2.15 (about an hour; needs a network)
	$(BIN)/python -m tests.versions $(if $(PAIRS),--pairs $(PAIRS))

CLUSTER := slurm-wlm munge iproute2 openssh-server pdsh openmpi-bin

test-all: cluster-packages ## Check style and types, then run all tests, long forms too (installs CLUSTER as root on Debian)
	$(MAKE) test SHORT=

test-ci: cluster-packages ## As test-all, without the cluster tests marked nightly, each of which waits for a minute or two
	$(MAKE) test SHORT='-m "not nightly"'

cluster-packages:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! dpkg -s $(CLUSTER) >/dev/null 2>&1; then \
		apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends $(CLUSTER); fi

clean: ## Delete caches (not .venv, runs or datasets)
	rm -rf build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find ijepa_scale kernels launch benchmarks tests -name __pycache__ -type d -exec rm -rf {} +
