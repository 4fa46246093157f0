# make help lists the targets. Everything runs in .venv, which make builds and keeps in step with the pinned versions.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.ready
PIP    := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# Options of `make reproduce`, given as `make reproduce SCALE=tiny SEEDS=3`. ARGS is handed on as it stands.
STUDY = depth
SCALE = laptop
SEEDS = 1
OUT   = runs
ARGS  =

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
STUDY_CHAPTERS := $(wildcard nbs/reproduce/*.ipynb)

.DEFAULT_GOAL := help
.PHONY: help env reproduce test docs readme export clean-notebooks clean

help:  ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo 'Options: reproduce takes STUDY=depth SCALE=laptop SEEDS=1 OUT=runs ARGS=...;'
	@echo '         PYTHON=python3.12 names the Python that a new .venv is made with.'

env: $(STAMP)  ## Build or refresh .venv, with the versions in constraints.txt

# An environment that is there and belongs to this folder is refreshed in place, quietly; otherwise it is made anew.
$(STAMP):
	@set -e; quiet=--quiet; \
	if ! head -n 1 $(BIN)/pip 2>/dev/null | grep -qF '$(CURDIR)/$(BIN)/' || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  $(PYTHON) -c '$(PYTHON_CHECK)'; \
	  echo 'Making the environment $(VENV): some minutes, most of them for PyTorch.'; quiet=; \
	  $(PYTHON) -m venv --clear $(VENV) || { echo 'On Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }; \
	fi; \
	$(PIP) $$quiet setuptools wheel; \
	$(PIP) $$quiet --no-build-isolation -e '.[dev]'; \
	echo '$(KEY)' > $@

reproduce: $(STAMP)  ## Run a study and write its report (into OUT, by default runs/)
	$(BIN)/sparsecod reproduce --study $(STUDY) --scale $(SCALE) --seeds $(SEEDS) --out $(OUT) $(ARGS)

test: $(STAMP)  ## Run all tests: export drift, notebooks, study chapters, pytest
	@echo '== Do notebooks and package agree?'
	$(BIN)/python tests/drift.py
	@echo '== Do all notebooks run?'
	$(ONE_CORE) $(BIN)/nbdev_test --do_print --timing
	@echo '== Are the stored outputs of the study chapters true?'
ifeq ($(STUDY_CHAPTERS),)
	@echo 'There are no study chapters in nbs/reproduce yet.'
else
	HF_HUB_OFFLINE=1 $(BIN)/python tests/stored_outputs.py $(STUDY_CHAPTERS)
endif
	@echo '== Tests of the package and the project'
	$(BIN)/python -m pytest

# nbdev would write README.md anew from the home page if that is newer; ours is written by hand, so make it the newer one.
docs: $(STAMP)  ## Render the site into _docs/ (needs Quarto)
	@command -v quarto >/dev/null || { echo 'Quarto is not installed: get it from https://quarto.org/docs/get-started/ and run make docs again.' >&2; exit 1; }
	@touch README.md
	$(BIN)/nbdev_docs
	@echo 'The site is in _docs/: open _docs/index.html.'

readme: $(STAMP)  ## Write what README.md says of results/, and its figure
	$(BIN)/python tests/readme.py

export: $(STAMP)  ## Write the package sparsecod/ from the notebooks
	$(BIN)/nbdev_export

clean-notebooks: $(STAMP)  ## Strip what does not belong in git from the notebooks
	$(BIN)/nbdev_clean

clean:  ## Remove the environment, the rendered site and caches; keep runs/
	rm -rf $(VENV) _docs _proc build dist *.egg-info .pytest_cache
