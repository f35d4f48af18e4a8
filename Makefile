# make demo | docs | test | lint | bench | wheels: each sets itself up on a fresh clone; needs Python 3.10+ with venv. The tests
# build mmcv, which needs a C++ compiler; the CPU scan brings its own, from PyPI.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
SCAN := $(addprefix vim2/ops/cpu/,build.py scan.cpp vectors.h)
WHEELS := manylinux_2_17_x86_64 manylinux_2_17_aarch64 macosx_11_0_arm64 win_amd64
FLOOR := .venv-floor
DIST := .venv-dist
FLOOR_TESTS := $(addprefix tests/test_,ops.py ops_cpu.py ops_transforms.py layers.py models.py models_architecture.py \
	models_weights.py vmamba.py vim.py tsm2.py hub.py forecasting.py)
JOBS ?= 2
SCAN_ARGS ?=
BENCH_MODELS ?= vim2_tiny swin_tiny_patch4_window7_224

.DEFAULT_GOAL := help
.PHONY: help setup demo docs test test-floor lint bench dist soak sanitize wheels clean

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## install the package and what it needs into .venv

$(STAMP): setup.py pyproject.toml constraints.txt $(SCAN)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is older than Python 3.10: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): PyTorch is large, this takes some minutes"
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[tools]'
	@touch $@

$(DEV_STAMP): $(STAMP)
	@echo "installing what the tests need: neuralforecast, darts, ..."
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## classify a photograph with the bundled weights, offline
	HF_HUB_OFFLINE=1 $(PY) tools/predict.py tools/assets/chelsea.jpg --annotate demo_output

docs: $(DEV_STAMP)  ## the documentation as a site, in site/: open site/index.html
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

lint: $(DEV_STAMP)  ## ruff, and mypy for the package's types
	$(PY) -m ruff check .
	$(PY) -m mypy

# JOBS processes of one thread each: most tests are bound by Python. A file stays in one process, for its fixtures.
test: lint  ## lint and all tests, OpenMMLab's included, whose mmcv is built once (about 11 minutes)
	$(PY) -m vim2.install_openmmlab -c constraints.txt
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) --dist loadfile

$(FLOOR)/.installed: setup.py constraints-floor.txt $(SCAN)
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-floor.txt \
		-e '.[tools,forecast]' pytest pytest-xdist expecttest hypothesis psutil ziglang
	@touch $@

test-floor: $(FLOOR)/.installed  ## the package's tests with the lowest versions that setup.py allows, in .venv-floor
	OMP_NUM_THREADS=1 $(FLOOR)/bin/python -m pytest -q -n $(JOBS) --dist loadfile $(FLOOR_TESTS)

bench: $(STAMP)  ## speed of the scan and of the models on this machine, as JSON
	$(PY) tools/benchmark.py scan $(SCAN_ARGS) --json
	$(PY) tools/benchmark.py model $(BENCH_MODELS) --json

wheels: $(STAMP)  ## a wheel for each of Linux x86-64 and aarch64, macOS arm64 and Windows x86-64, in dist/
	for platform in $(WHEELS); do \
		VIM2_PLATFORM=$$platform $(PY) -m pip wheel --quiet --no-deps --wheel-dir dist . || exit 1; done

dist:  ## source distribution and this machine's wheel, checked by twine, in dist/
	$(PYTHON) -m venv $(DIST)
	$(DIST)/bin/python -m pip install --quiet --disable-pip-version-check build twine
	rm -rf dist
	$(DIST)/bin/python -m build --outdir dist .
	$(DIST)/bin/python -m twine check --strict dist/*

soak: $(DEV_STAMP)  ## training, evaluation and prediction in turn for ten minutes: memory and speed stay flat
	$(PY) tests/soak.py

sanitize: $(DEV_STAMP)  ## the tests of the scan with its C++ library under AddressSanitizer and UBSan; needs GCC
	$(PY) tests/sanitized.py

clean:  ## remove .venv and everything that was generated
	rm -rf $(VENV) $(FLOOR) $(DIST) build dist site *.egg-info vim2/ops/cpu/scan_* .pytest_cache .ruff_cache demo_output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
