# make help lists the targets. Everything runs in .venv, which make builds and keeps in step with the pinned versions.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
PIP    := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# Options of `make reproduce`, given as `make reproduce SCALE=tiny SEEDS=3`. ARGS is handed on as it stands.
STUDY = main
SCALE = laptop
SEEDS = 1
OUT   = runs
ARGS  =

# A text as one word of the shell, whatever is in it: the folder may be called o'brien.
quote = '$(subst ','\'',$1)'

# The stamp holds what the environment was built from: the folder and a checksum of the files below.
BUILT_FROM := constraints.txt settings.ini pyproject.toml setup.py
KEY := $(CURDIR) $(shell cat $(BUILT_FROM) | cksum)
ifneq ($(strip $(shell cat $(STAMP) 2>/dev/null)),$(strip $(KEY)))
.PHONY: $(STAMP)
endif

PYTHON_CHECK = import sys; found = sys.version.split()[0]; \
  sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else \
  "sparsecod needs Python 3.11, 3.12 or 3.13; $(PYTHON) is " + found + ". Name another one: make PYTHON=python3.12 ...")

# Notebooks run in parallel, one core each.
ONE_CORE := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
READ_BACK := nbs/index.ipynb nbs/build/02_moe.ipynb nbs/tools/02_compilation.ipynb $(wildcard nbs/reproduce/*.ipynb nbs/beyond/*.ipynb nbs/reference/*.ipynb)

.DEFAULT_GOAL := help
.PHONY: help env reproduce lint chapters test test-all chromium docs docs-check docs-look preview readme export clean-notebooks dist clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'Options: reproduce takes STUDY=main SCALE=laptop SEEDS=1 OUT=runs ARGS=...;'
	@echo '         PYTHON=python3.12 names the Python that a new .venv is made with.'

env: $(STAMP)  ## Build or refresh .venv, with the versions in constraints.txt

# An environment that is there and belongs to this folder is refreshed in place, quietly; otherwise it is made anew.
$(STAMP):
	@set -e; quiet=--quiet; \
	if ! head -n 2 $(BIN)/pip 2>/dev/null | grep -qF $(call quote,$(CURDIR)/$(BIN)/) || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  $(PYTHON) -c '$(PYTHON_CHECK)'; \
	  echo 'Making the environment $(VENV): some minutes, most of them for PyTorch.'; quiet=; \
	  $(PYTHON) -m venv --clear $(VENV) || { echo 'On Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }; \
	fi; \
	$(PIP) $$quiet setuptools wheel; \
	$(PIP) $$quiet --no-build-isolation -e '.[dev]'; \
	printf '%s\n' $(call quote,$(KEY)) > $@

reproduce: $(STAMP)  ## Train two models and set them beside the record, or run another study (into OUT, by default runs/)
	$(BIN)/sparsecod reproduce --study $(STUDY) --scale $(SCALE) --seeds $(SEEDS) --out $(OUT) $(ARGS)

# What a contributor runs all day: the building chapters and the tests of what they build.
QUICK := $(addprefix tests/test_,core.py moe.py ngrams.py sparsity.py theory.py)

lint: $(STAMP)  ## Check that notebooks and package agree, and that the code is in order
	@echo '== Do notebooks and package agree?'
	$(BIN)/python tests/drift.py
	@echo '== Is the code in order?'
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python --output-format min-text

chapters: lint  ## Lint, and run the building chapters
	@echo '== Do the building chapters run?'
	$(ONE_CORE) $(BIN)/nbdev_test --path nbs/build --do_print --timing

test: chapters  ## Run the quick tests: the building chapters and the tests of the model (some minutes)
	@echo '== Tests of the model'
	$(ONE_CORE) $(BIN)/python -m pytest -n logical --dist loadfile $(QUICK)

test-all: chromium lint  ## Run all tests: chapters, tools, studies, docs, pytest with site and browser
	@echo '== Do the building chapters and the tools run?'
	$(ONE_CORE) $(BIN)/nbdev_test --path nbs --folder_re 'build|tools' --skip_file_re '^([_.]|index)' --do_print --timing
	@echo '== Do the other pages run, and are their stored outputs true?'
	$(ONE_CORE) $(BIN)/python tests/stored_outputs.py $(READ_BACK)
	@echo '== Are the docs in order?'
	$(ONE_CORE) $(BIN)/python tests/docs_check.py --pages _preview --check
	@echo '== Tests of the package and the project'
	$(ONE_CORE) $(BIN)/python -m pytest -n logical --dist loadfile --preview=_preview

# nbdev looks for _quarto.yml in nbs/, so it gets a copy of the one at the root, made anew each time. It would write README.md
# anew from the home page if that is newer; ours is written by hand, so make it the newer one. tests/ has the processors of settings.ini.
docs: $(STAMP)  ## Render the site into _docs/ (needs Quarto)
	@command -v quarto >/dev/null || { echo 'Quarto is not installed: get it from https://quarto.org/docs/get-started/ and run make docs again.' >&2; exit 1; }
	@rm -rf _proc; cp _quarto.yml nbs/_quarto.yml; cp sparsecod/templates/vega.js nbs/vega.js; touch README.md
	PYTHONPATH=$(call quote,$(CURDIR)/tests):$$PYTHONPATH $(BIN)/nbdev_docs
	@echo 'The site is in _docs/: open _docs/index.html.'

docs-look: $(STAMP) chromium  ## Open the rendered pages in _docs/ in a browser without network
	@test -f _docs/index.html || { echo 'There are no rendered pages in _docs/: run make docs first.' >&2; exit 1; }
	$(BIN)/python -m pytest -q tests/test_site.py --site _docs

preview: $(STAMP)  ## Write pages to look at into _preview/, without Quarto
	$(BIN)/python tests/docs_check.py --pages _preview

# The browser tests drive the system's Chromium. Where this may install packages, it does; elsewhere it says what to do.
chromium:  ## Make sure that there is a Chromium for the browser tests
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo 'Installing Chromium from the packages of the system.'; export DEBIAN_FRONTEND=noninteractive; \
	  apt-get install -y -qq chromium fonts-dejavu-core >/dev/null 2>&1 || \
	  { apt-get update -qq && apt-get install -y -qq chromium fonts-dejavu-core >/dev/null; }; \
	else echo 'The browser tests need Chromium and a font. On Debian and Ubuntu: apt-get install chromium fonts-dejavu-core' >&2; exit 1; fi

docs-check: $(STAMP)  ## Check pages, links, formulas and explorers without Quarto
	$(BIN)/python tests/docs_check.py

readme: $(STAMP)  ## Write what README.md says of results/, and its figure
	$(BIN)/python tests/readme.py

export: $(STAMP)  ## Write the package sparsecod/ from the notebooks
	$(BIN)/nbdev_export

clean-notebooks: $(STAMP)  ## Strip what does not belong in git from the notebooks
	$(BIN)/nbdev_clean

dist: $(STAMP)  ## Build wheel and source into dist/, and run the README's example from the wheel in an empty environment
	rm -rf dist build
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/python tests/from_wheel.py dist/*.whl

clean:  ## Remove the environment, the rendered site and caches; keep runs/
	rm -rf $(VENV) _docs _preview _proc build dist *.egg-info .pytest_cache
