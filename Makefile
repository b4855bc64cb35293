# Every target sets up what it needs in .venv, also on a machine that has nothing but Python and make.
#
#   make demo                    the demonstration (make demo ARGS=--fsdp for FSDP)
#   make test                    all tests, on the built wheel (make test ARGS="-k ring -x" for some)
#   make check                   lint, format, types, layers
#   make bench                   the figures of the README
#   make soak                    the long tests
#   make services                the tests against real services (what is not installed is skipped, with its reason)
#
# WORKERS=0 runs the tests in one process, for a debugger.
# PYTHON=python3.12 chooses the interpreter. TORCH=PATH installs that torch wheel instead of the one pip would choose;
# on Linux that is the CUDA build (gigabytes), and the CPU build of the same version is enough for everything here.

VENV ?= .venv
ARGS ?=
WORKERS ?= 2
TORCH ?=
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
CANDIDATES := python3 python3.13 python3.12 python3.11 python3.10 python
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)

BIN := $(VENV)/bin
BASE := $(VENV)/.base-installed
DEV := $(VENV)/.dev-installed
SITE := build/site
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find arc_dist -name '*.py' -o -name py.typed -o -name '*.html')
export OMP_NUM_THREADS ?= 1

.PHONY: demo test check coverage bench soak services format clean
.DELETE_ON_ERROR:

demo: $(BASE)
	$(BIN)/python examples/demo.py $(ARGS)

test: $(DEV) $(SITE)/.installed
	ARC_TEST_INSTALLED=1 PYTHONPATH=$(CURDIR)/$(SITE) $(BIN)/pytest -n $(WORKERS) --dist worksteal $(ARGS)

soak: $(DEV) $(SITE)/.installed
	ARC_TEST_INSTALLED=1 PYTHONPATH=$(CURDIR)/$(SITE) $(BIN)/pytest -m soak --timeout=7200 -o faulthandler_timeout=7100 $(ARGS)

services: $(DEV) $(SITE)/.installed
	@echo "needs, on Debian: apt-get install --no-install-recommends ceph-mon ceph-osd radosgw ceph-common user-mode-linux nfs-kernel-server nfs-common"
	ARC_TEST_INSTALLED=1 PYTHONPATH=$(CURDIR)/$(SITE) $(BIN)/pytest -m soak --timeout=900 -o faulthandler_timeout=850 \
	    tests/test_real_*.py $(ARGS)

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache

# Every branch of the rules, by the tests of the rules alone.
coverage: $(DEV)
	@mkdir -p build
	$(BIN)/coverage run --data-file=build/coverage --branch --source=arc_dist.protocol -m pytest -q -p no:cacheprovider \
	    $(wildcard tests/test_protocol_*.py) tests/test_preemption_rules.py tests/test_simulated_supervisor.py $(ARGS)
	$(BIN)/coverage report --data-file=build/coverage --show-missing --fail-under=100

bench: $(DEV)
	@for script in benchmarks/bench_*.py; do echo "== $$script"; $(BIN)/python $$script $(ARGS) || exit 1; done

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info

# numpy is not needed by the package; without it torch warns at many calls.
$(BASE): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.13 found; name one: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "$(PYTHON) is not Python 3.10 to 3.13"; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV) || $(PYTHON) -m virtualenv $(VENV) || \
	    { rm -rf $(VENV); echo "$(PYTHON) cannot make virtual environments: install its venv package (python3-venv)"; exit 1; }
	$(if $(TORCH),$(PIP) install -q $(TORCH))
	$(PIP) install -q -c constraints.txt -e . numpy
	@touch $@

$(DEV): $(BASE)
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@

# The wheel as users get it, unpacked beside the environment so that the checkout is not what is tested.
$(SITE)/.installed: $(SOURCES) pyproject.toml README.md LICENSE | $(DEV)
	rm -rf build
	mkdir -p build
	$(BIN)/python -m build --wheel --no-isolation --outdir build/wheel . >build/wheel.log 2>&1 || \
	    { cat build/wheel.log; exit 1; }
	$(PIP) install -q --no-deps --target $(SITE) build/wheel/*.whl
	@touch $@
