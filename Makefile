# make install     the command at .venv/bin/video-opd
# make demo        install, then run the main job on embedded defaults
# make test        install with the tools, then run the tests
# make bench       install with lmms-eval, for "video-opd suite"
# make test-bench  run the tests that need lmms-eval
# make test-vllm  make an environment with vLLM for a CPU, and run the tests that need it
# make fuzz        read 9,600 broken files of every kind (make test reads some of them)
# make lint, make types
# make schema    recipes/schema.json, which completes recipes in an editor

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEMO_ARGS ?=
PYTEST_ARGS ?=

# Threads that spin while they wait slow each other tenfold when several processes share few cores.
export OMP_WAIT_POLICY ?= PASSIVE
# Container images often set it. Every process would then compile torch and transformers again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install bench demo test test-long test-vllm fuzz test-bench lint types schema clean
.DELETE_ON_ERROR:

install: $(VENV)/.stamp-package

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "video-opd needs Python 3.10 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

# --no-deps: the file names everything, so there is nothing to resolve. --no-compile: Python compiles what it
# imports on first use, which is a small part of what is installed.
$(VENV)/.stamp-base: requirements/base.txt | $(BIN)/python
	$(PIP) install --require-hashes --no-deps --no-compile -r $<
	touch $@

$(VENV)/.stamp-dev: requirements/dev.txt $(VENV)/.stamp-base
	$(PIP) install --require-hashes --no-deps --no-compile -r $<
	touch $@

# Beside the others, not among them: libraries that find torchcodec use it, whether or not it can be loaded, and
# transformers imports torchao in every process that finds it, which takes seconds.
$(VENV)/.stamp-torchcodec $(VENV)/.stamp-torchao: $(VENV)/.stamp-%: requirements/%.txt $(VENV)/.stamp-base
	$(PIP) install --require-hashes --no-deps --no-compile --upgrade --target $(VENV)/$* -r $<
	touch $@

$(VENV)/.stamp-bench: requirements/bench.txt $(VENV)/.stamp-base
	$(PIP) install --require-hashes --no-deps --no-compile -r $<
	touch $@

$(VENV)/.stamp-package: pyproject.toml $(VENV)/.stamp-base
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	touch $@

bench: install $(VENV)/.stamp-bench

demo: install
	$(BIN)/video-opd demo $(DEMO_ARGS)

test: install $(VENV)/.stamp-dev $(VENV)/.stamp-torchao
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(PYTEST_ARGS)

test-bench: bench $(VENV)/.stamp-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m bench tests/bench $(PYTEST_ARGS)

test-long: install $(VENV)/.stamp-dev $(VENV)/.stamp-torchcodec $(VENV)/.stamp-torchao
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow $(PYTEST_ARGS)
	PYTHONPATH=$(CURDIR)/$(VENV)/torchcodec OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit/data/test_torchcodec.py $(PYTEST_ARGS)

# vLLM pins its torch and transformers, so its environment is another one.
.venv-vllm/.stamp: tests/real_vllm/environment.sh tests/real_vllm/torchvision_schemas.py
	tests/real_vllm/environment.sh .venv-vllm
	touch $@

test-vllm: .venv-vllm/.stamp
	VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 TORCHDYNAMO_DISABLE=1 HF_HUB_OFFLINE=1 \
		.venv-vllm/bin/python -m pytest -m vllm tests/real_vllm $(PYTEST_ARGS)

fuzz: install $(VENV)/.stamp-dev
	VIDEO_OPD_FUZZ=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit/test_fuzz.py -s

lint: install $(VENV)/.stamp-dev
	$(BIN)/ruff check .

types: install $(VENV)/.stamp-dev
	$(BIN)/mypy

schema: install
	$(BIN)/python -m video_opd.config > recipes/schema.json

clean:
	rm -rf $(VENV) .venv-vllm build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
