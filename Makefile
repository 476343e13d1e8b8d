# make setup        make .venv and install the locked packages
# make quickstart   set up, train and evaluate on synthetic X-rays, say where the report lies
# make test         set up, lint, type-check and test
# make test-all     the same with the slow tests: several devices or processes, whole runs, sisters
# make tpu-compiler set up scripts/aot_compile.py (make test does so too)
# make lock         resolve the lock files anew from pyproject.toml
# make sbom         write build/sbom.cdx.json, what requirements.lock installs (CycloneDX)
# make audit        ask PyPI for known vulnerabilities of what requirements.lock installs

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
QUICKSTART := runs/quickstart-demo

.PHONY: setup quickstart test test-all lint tpu-compiler lock sbom audit clean

setup: $(VENV)/.runtime

quickstart: $(VENV)/.runtime
	rm -rf $(QUICKSTART)
	$(BIN)/python -m covid_flax.main --config=configs/quickstart.py --workdir=$(QUICKSTART)

test: lint $(VENV)/.tpu-compiler
	$(BIN)/python -m pytest

test-all: lint $(VENV)/.tpu-compiler
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -m "slow or not slow"

tpu-compiler: $(VENV)/.runtime $(VENV)/.tpu-compiler

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.runtime: $(VENV)/.made requirements.lock pyproject.toml
	@echo "installing the locked packages into $(VENV) (a minute or two, once)"
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/.test: $(VENV)/.runtime requirements-test.lock
	$(BIN)/python -m pip install --quiet --require-hashes --requirement requirements-test.lock
	touch $@

# Kept out of the packages' folder: where JAX finds libtpu it looks for TPUs at every start.
$(VENV)/.tpu-compiler: $(VENV)/.made requirements-tpu-compiler.txt
	$(BIN)/python -m pip install --quiet --require-hashes --no-deps --upgrade \
	  --target $(VENV)/tpu-compiler --requirement requirements-tpu-compiler.txt && touch $@ || \
	  echo "the TPU compiler could not be installed (see above): what needs it is skipped" >&2

lock: $(VENV)/.made
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
	  --no-header --output-file requirements.lock pyproject.toml requirements-build.txt
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest --generate-hashes \
	  --no-header --extra test --constraint requirements.lock \
	  --output-file requirements-test.lock pyproject.toml requirements-build.txt

build/supply-chain/.made:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet cyclonedx-bom==7.5.0 pip-audit==2.10.1
	touch $@

sbom: build/supply-chain/.made requirements.lock
	build/supply-chain/bin/cyclonedx-py requirements --pyproject pyproject.toml \
	  --output-reproducible --of JSON --output-file build/sbom.cdx.json requirements.lock

audit: build/supply-chain/.made requirements.lock
	build/supply-chain/bin/pip-audit --require-hashes --disable-pip --strict --requirement requirements.lock

clean:
	rm -rf $(VENV) build runs .pytest_cache .mypy_cache .ruff_cache *.egg-info
