# make demo    train, measure and see a prompt, in a few minutes on two cores
# make test    the tests
# make check   the slow tests on real weights and images: VPT_DATA=FOLDER make check
# make test-floor    the tests with every dependency at the oldest version that is allowed
# make test-minimal  the tests without optional extras
# make docs    the documentation site, in build/site
# make bench   speed and memory against the plain formulation
# make bench-gpu  the tests of tests/gpu, speed and memory on one card, in eight minutes
# make lint    ruff and mypy
# make clean   removes caches and builds, not runs/ and not .venv/
#
# All of them make .venv and install into it first, when pyproject.toml is newer than the last installation.

PYTHON ?= python3
JOBS ?= 2
BIN := .venv/bin
INSTALLED := .venv/.installed
VPT := $(BIN)/vpt
DEMO := runs/demo
LINEAR := $(DEMO)/digits/linear/version_0
DEEP := $(DEMO)/digits/vpt_deep/version_0

.PHONY: demo test test-floor test-minimal check docs bench bench-gpu lint clean
.DELETE_ON_ERROR:

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("vpt needs Python 3.10 or later: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --editable '.[dev]'
	@touch $@

demo: $(INSTALLED)
	rm -rf $(DEMO)
	$(VPT) fit -c configs/demo.yaml -c configs/method/linear.yaml --trainer.default_root_dir $(DEMO)
	$(VPT) fit -c configs/demo.yaml --trainer.default_root_dir $(DEMO)
	$(VPT) test -c $(LINEAR)/config.yaml --ckpt_path $(LINEAR)/checkpoints/last.ckpt
	$(VPT) test -c $(DEEP)/config.yaml --ckpt_path $(DEEP)/checkpoints/last.ckpt
	$(VPT) robustness run --delta $(DEEP)/delta.safetensors --anchor $(LINEAR)/delta.safetensors --max-images 200 --severities 3
	$(VPT) attention --delta $(DEEP)/delta.safetensors
	@$(VPT) runs $(DEMO)

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" -n $(JOBS)

test-floor:
	$(PYTHON) -m venv --clear .venv-floor
	$(PYTHON) tests/floors.py > .venv-floor/floors.txt
	.venv-floor/bin/python -m pip install --constraint .venv-floor/floors.txt --editable '.[test]'
	.venv-floor/bin/python -m pytest -m "not slow" -n $(JOBS)

test-minimal:
	$(PYTHON) -m venv --clear .venv-minimal
	.venv-minimal/bin/python -m pip install --editable '.[test]'
	.venv-minimal/bin/python -m pytest -m "not slow" -n $(JOBS)

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

check: $(INSTALLED)
	$(BIN)/python -m pytest -m slow -n $(JOBS)

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.delta_steps
	$(BIN)/python -m benchmarks.whole_models

bench-gpu: $(INSTALLED)
	$(BIN)/python -m benchmarks.gpu

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
