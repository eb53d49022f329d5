# make demo    handwritten digits: train against a global, a local and a composed bound, certify; about a minute and a half
# make test    all tests, and the CUDA kernels emulated on the host under sanitizers
# make fuzz    certificates of 2000 random networks against points of their balls, an hour and a half at most
# make lint    ruff, mypy, clang-format
# make bench   benchmarks beside their baselines
# make docs    the documentation as HTML, docs/build/html/index.html; a warning is an error
#
# Each creates .venv and installs what it needs first. TORCH chooses the torch, for example
#     make test TORCH="torch==2.14.1"
# and the extension is compiled for it, with CUDA where that torch has it and a CUDA toolkit is found.

TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV ?= .venv

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip
COMPILED = setup.py pyproject.toml $(wildcard build_support/*.py) $(filter-out %.toml,$(wildcard csrc/*.* csrc/*/*.*))

.PHONY: demo test pytest emulated fuzz lint ruff mypy clang-format bench docs FORCE

demo: $(VENV)/installed-plot
	rm -rf runs/demo
	$(BIN)/locallip compare digits --rows gloro local composed --seeds 0 --out runs/demo

test: pytest emulated

# at most four processes: each holds a torch, and some compile
pytest: $(VENV)/installed-test
	$(BIN)/python -m pytest --quiet --numprocesses auto --maxprocesses 4 --dist loadfile

emulated: $(VENV)/installed-test
	$(BIN)/python -m tests.emulation

fuzz: $(VENV)/installed-test
	$(BIN)/python -m tests.fuzz

lint: ruff mypy clang-format

ruff: $(VENV)/installed-test
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

mypy: $(VENV)/installed-test
	$(BIN)/python -m mypy

clang-format: $(VENV)/installed-test
	$(BIN)/clang-format --dry-run --Werror \
	    $(filter-out %.toml,$(wildcard csrc/*.* csrc/*/*.*)) $(wildcard tests/emulation/*.h tests/emulation/*.cpp)

bench: $(VENV)/installed-test
	$(BIN)/python -m bench

docs: $(VENV)/installed-docs
	$(BIN)/python docs/generate.py
	$(BIN)/python -m sphinx --builder html --fail-on-warning --keep-going --fresh-env --quiet docs docs/build/html

# Editable, so that changed Python files count at once; changed C++ and CUDA files are compiled by the next make.
$(VENV)/installed-%: $(VENV)/torch $(COMPILED)
	$(PIP) install --editable '.[$*]'
	@touch $@

$(VENV)/torch: FORCE
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test "$$(cat $@ 2>/dev/null)" = '$(TORCH)' || { $(PIP) install '$(TORCH)' && echo '$(TORCH)' > $@; }

FORCE:
