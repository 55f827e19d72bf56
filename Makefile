# Everything runs in .venv, made from constraints.txt on first use.
PYTHON ?= python3
SERVE ?= 1
WORKERS ?= 2              # processes that tests run in
COV ?= --cov --cov-report=term
BIN := .venv/bin
TOOLS := .venv/tools.stamp
TESTS := .venv/tests.stamp
LOWEST := import tomllib; needed = tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]; \
	print(*(each.split(";")[0].replace(">=", "==") for each in needed if ">=" in each), sep="\n")
export NO_MKDOCS_2_WARNING := 1

.PHONY: run test test-fast test-all test-lowest method mutate check lists site report bench clean

run: $(TOOLS)            ## check, render, generate, build the site and serve it (SERVE=0: only build)
	$(BIN)/python tools/check_catalog.py --fix
	$(BIN)/python tools/report.py
	$(BIN)/mkdocs build --quiet
	@if [ "$(SERVE)" = 0 ]; then echo "built build/report/index.html and build/site/index.html"; \
	else $(BIN)/python tools/serve.py; fi

test: $(TESTS)           ## all checks on a family of each kind, a few on the others
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal $(COV)

test-fast: $(TESTS)      ## what needs no pipeline, browser or compiler
	$(BIN)/python -m pytest -q -n $(WORKERS) -m "not slow" -x

test-all: $(TESTS)       ## every check of every method on every family; the nightly run
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --everything $(COV)

test-lowest:             ## test-fast on the oldest versions that pyproject.toml allows, in an environment of its own
	$(PYTHON) -m venv build/lowest
	$(PYTHON) -c '$(LOWEST)' > build/lowest.txt
	build/lowest/bin/pip install --quiet --disable-pip-version-check --constraint build/lowest.txt --editable '.[tools,test]'
	build/lowest/bin/python -m pytest -q -n $(WORKERS) -m "not slow"

method: $(TESTS)         ## SLUG=x: start it if it is not there; then check, lists, its rows in the three tables, its tests
	@test -n "$(SLUG)" || { echo 'say which: make method SLUG=x, for a new one with ARGS="--name X --kind patch --bibtex x.bib"'; exit 2; }
	@test -f catalog/entries/$(SLUG).yaml || $(BIN)/python tools/new_entry.py --slug $(SLUG) $(ARGS)
	$(BIN)/python tools/check_catalog.py --fix
	! grep -q '^kind: patch' catalog/entries/$(SLUG).yaml || \
	$(BIN)/python -m pytest -q tests/test_compatibility.py tests/test_surroundings.py tests/test_pairs.py -k test_table --update --method $(SLUG)
	$(BIN)/python -m pytest -q -n $(WORKERS) tests/methods/test_$(SLUG).py

mutate: $(TESTS)         ## METHOD=x: small changes of its code, one after the other, each of which its tests must notice
	@test -n "$(METHOD)" || { echo 'say which: make mutate METHOD=x'; exit 2; }
	$(BIN)/python tools/mutate.py --method $(METHOD) $(ARGS)

check: $(TESTS) build/types   ## catalogue, generated files, style, types: all that is wrong, in one round
	@failed=0; for command in "python tools/check_catalog.py" "ruff check ." mypy; do $(BIN)/$$command || failed=1; done; \
	exit $$failed

lists: $(TOOLS)          ## README summary and the three lists
	$(BIN)/python tools/render_readme.py

site: $(TOOLS)
	$(BIN)/mkdocs build

report: $(TOOLS)
	$(BIN)/python tools/report.py

bench: $(TESTS)
	$(BIN)/python tools/bench.py

clean:
	rm -rf build .venv .mypy_cache

build/types:             # the packages by the names they are imported by
	mkdir -p $@
	ln -s ../../methods $@/methods
	ln -s ../../kernels $@/accel_kernels

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "genaccel needs Python 3.11 or newer; this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv

$(TOOLS): .venv/bin/python pyproject.toml constraints.txt
	@echo "installing (a few minutes the first time)"
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[tools]'
	@touch $@

$(TESTS): $(TOOLS)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[tools,test,peers,cluster]'
	@touch $@
