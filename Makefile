# The four doors: make demo, make test, make check, make bench. Each does its own set-up, once; it is renewed when the
# project's metadata or the sets of versions change. Only python3 (3.11) with venv, git and make are needed.

# The first of these that really starts (pyenv leaves shims that do not).
first_working = $(shell for p in $(1); do "$$p" -c pass 2>/dev/null && { command -v "$$p"; break; }; done)
pyenv_of      = $(wildcard $(HOME)/.pyenv/versions/$(1).*/bin/python3)

PYTHON        ?= $(call first_working,python3.11 python3.12 python3 $(call pyenv_of,3.11))
# Devices may be older: their part is tested with 3.10 where it is there.
PYTHON_DEVICE ?= $(call first_working,python3.10 $(call pyenv_of,3.10) $(PYTHON))
PYTHON_LEGACY ?= $(call first_working,python3.10 $(call pyenv_of,3.10) python3.11 $(PYTHON))

VENV    := .venv
BIN     := $(VENV)/bin
HOST    := $(VENV)/.installed
DEVICE  := .venv-device/.installed
LEGACY  := .venv-legacy/.installed
PROJECTS := agent/pyproject.toml agent/hatch_build.py host/pyproject.toml
SITE    := .venv-docs/.installed
LINT    := .venv-lint/.installed
LOCKS   := $(wildcard targets/kedge_targets/backends/*/toolchain/requirements.txt)

# Loopback only, and no vendor's telemetry.
export KEDGE_ROOT := $(CURDIR)
export DO_NOT_TRACK := 1

# Tests run in one process more than there are processors; WORKERS=0 for one process, whose output and debugger are seen.
# A file's tests stay in one process, so that they share its fixtures.
WORKERS := auto
PYTEST  := -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo test test-host test-device campaign zoo gpu check coverage lint dist docs locks bench format golden slow clean \
        setup toolchains

help:
	@echo "make demo    the main job, shown: train, compile, roll out to three agents (KEEP=1 leaves it running);"
	@echo "             ARGS=ocr: a photo goes in, text comes out of two devices"
	@echo "             ARGS=chat: SmolLM2 answers on two devices (its weights, 95 MB, come from the package index)"
	@echo "             ARGS=fleet: two hundred simulated devices, a good release and a bad one"
	@echo "make test    all tests (ARGS='-k name' picks some; ARGS=\"-m 'not slow'\" is quick)"
	@echo "make campaign  the long proofs (hours); make zoo: foreign models, in environments of their own"
	@echo "make gpu     what needs an NVIDIA GPU (8 minutes at most), with TensorRT, cuda-python, onnxruntime-gpu in $(VENV)"
	@echo "make check   ruff, mypy, import contracts"
	@echo "make lint    workflows, compose file, Dockerfile, shell scripts"
	@echo "make coverage  the host's tests again, with the lines that they run (ARGS picks some)"
	@echo "make docs    the documentation site, in build/site"
	@echo "make dist    the wheels of both distributions, in dist/"
	@echo "make bench   speed and memory as ratios against named baselines"

$(HOST): $(PROJECTS) constraints/host.txt constraints/proofs.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kedge: compiling needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the compiler and the controller into $(VENV) (2.5 GB, minutes, once)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints/host.txt -e './agent[serving]' -e './host[host,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints/proofs.txt
	@touch $@

$(DEVICE): $(PROJECTS) constraints/device.txt constraints/proofs.txt
	@test -x .venv-device/bin/python || $(PYTHON_DEVICE) -m venv .venv-device
	@echo "installing what a device has into .venv-device (once)"
	.venv-device/bin/python -m pip install --quiet --disable-pip-version-check -c constraints/device.txt \
	  -e './agent[tflite,onnxruntime,serving]' pytest pytest-timeout pytest-xdist hypothesis onnx bitstring matplotlib
	.venv-device/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	  $$(grep -E '^(finn-plus-driver|qonnx)==' constraints/proofs.txt)
	@touch $@

$(LEGACY): $(PROJECTS) constraints/device-legacy.txt
	@test -x .venv-legacy/bin/python || $(PYTHON_LEGACY) -m venv .venv-legacy
	@echo "installing what a legacy device has into .venv-legacy (once)"
	.venv-legacy/bin/python -m pip install --quiet --disable-pip-version-check -c constraints/device-legacy.txt \
	  -e './agent[tflite-legacy]'
	@touch $@

$(SITE): $(PROJECTS) constraints/host.txt constraints/docs.txt
	@test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check \
	  -c constraints/host.txt -c constraints/docs.txt -e ./agent -e './host[docs]'
	@touch $@

$(LINT): constraints/lint.txt
	@test -x .venv-lint/bin/python || $(PYTHON) -m venv .venv-lint
	.venv-lint/bin/python -m pip install --quiet --disable-pip-version-check --only-binary=:all: -r constraints/lint.txt
	@touch $@

# The tests want every toolchain; one that cannot be had here (its Python is missing) says so, and its tests skip aloud.
$(VENV)/.toolchains: $(HOST) $(LOCKS)
	@for lock in $(LOCKS); do \
	  name=$$(basename $$(dirname $$(dirname $$lock))); \
	  $(BIN)/kedge toolchain install $$name || echo "the toolchain $$name is not there: its tests will skip"; \
	done
	@touch $@

# The demo's targets need this one.
$(VENV)/.demo-toolchain: $(HOST) $(LOCKS)
	@echo "installing the toolchain tflite (1.6 GB, minutes, once)"
	@$(BIN)/kedge toolchain install tflite
	@touch $@

toolchains: $(VENV)/.toolchains
setup: $(HOST) $(DEVICE) $(LEGACY) $(VENV)/.toolchains

demo: $(HOST) $(if $(filter chat fleet,$(ARGS)),,$(VENV)/.demo-toolchain)
	$(BIN)/python -m kedge.demo $(ARGS) $(if $(KEEP),--keep)

test: test-device test-host

test-host: setup
	$(BIN)/python $(PYTEST) $(ARGS)

# Long proofs, each of which has a short form in make test, and the property tests with examples of their own.
campaign: setup
	$(BIN)/python $(PYTEST) --campaign $(ARGS)

# Models that others published, in an environment of their own.
zoo: setup
	$(BIN)/python -m pytest --zoo $(ARGS)

# What needs a GPU; what of it is not there is skipped aloud.
gpu: $(HOST)
	timeout 480 $(BIN)/python -m pytest -n 0 -v -rs -s tests/integration/*_gpu.py $(ARGS)

# What an agent runs, on the oldest Python of devices, with a device's packages and nothing of the host's. ARGS may pick
# tests of the host alone (pytest's status 5: none is left).
test-device: $(DEVICE)
	@.venv-device/bin/python $(PYTEST) -q -p no:cacheprovider --device $(ARGS) || [ $$? -eq 5 ]

check: $(HOST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_names.py
	$(BIN)/python tools/check_tree.py

# What no linter of Python reads.
lint: $(LINT)
	.venv-lint/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	.venv-lint/bin/check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml
	.venv-lint/bin/hadolint deploy/controller/Dockerfile
	.venv-lint/bin/shellcheck .ci/run deploy/*.sh firmware-configs/common/install.sh

# Child processes (workers, commands, agents) are counted too.
coverage: setup
	$(BIN)/python -m coverage erase
	$(BIN)/python -m coverage run $(PYTEST) $(ARGS)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage html --quiet --directory build/coverage
	$(BIN)/python -m coverage report --skip-covered

# One tree, one version, two wheels: the host's and the device's.
dist: $(HOST)
	rm -rf dist
	$(BIN)/python -m build --no-isolation --wheel --outdir dist agent
	$(BIN)/python -m build --no-isolation --wheel --outdir dist host

# Warnings are errors: a link that leads nowhere, a page that the navigation lacks.
docs: $(SITE)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build
	@echo "to read it with its search: $(PYTHON) -m http.server --bind 127.0.0.1 --directory build/site 8000"

# The boards' Python packages, with hashes: resolved anew from firmware-configs/**/pip.in; look at the difference.
locks: $(HOST)
	$(BIN)/python tools/lock_kits.py

bench: setup
	$(BIN)/python -m benchmarks $(ARGS)

format: $(HOST)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Golden files are written anew by this one command; look at the difference before it is committed.
golden: $(HOST)
	$(BIN)/python -m pytest -q --regenerate-golden tests/unit

# tests/slow.txt, from the figures of make test-host ARGS="--cpu-record=FIGURES".
slow: $(HOST)
	$(BIN)/python -m pytest --collect-only -q --update-slow=$(RECORD)

clean:
	rm -rf .venv .venv-device .venv-legacy .venv-docs .venv-lint dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
