# Every target sets itself up from nothing and does nothing twice.
#   make reproduce [PAPER=movement] [PROFILE=demo]   run the experiments, print the table
#   make test        notebooks, pytest, export in sync, site
#   make docs        the site, in _docs/index.html
#   make lab         JupyterLab on the notebooks
#   make bench       speed, as ratios
#   make refresh     run the notebooks and keep their outputs; make README.md from nbs/index.ipynb
#   make keep [PROFILE=demo]   make our results the reference that is committed
#   make clean       take away what was built; results stay

PYTHON ?= python3
PAPER ?= movement
PROFILE ?= demo
BIN := .venv/bin

.PHONY: reproduce test docs lab bench refresh export keep clean
.DELETE_ON_ERROR:

reproduce: .venv/offline.done
	@$(BIN)/python -m pruning_bias.reproduce $(PAPER) $(PROFILE)

test: .venv/dev.done
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

docs: .venv/dev.done
	@$(BIN)/python docs/build.py

lab: .venv/lab.done
	@$(BIN)/jupyter lab nbs

bench: .venv/dev.done
	@PYTHONPATH=tests $(BIN)/python -m bench

export: .venv/dev.done
	@$(BIN)/nbdev-export && $(BIN)/nbdev-clean

refresh: export
	@OMP_NUM_THREADS=1 PYTHONWARNINGS="ignore:IProgress not found" $(BIN)/nbdev-test --save --n-workers 2
	@$(BIN)/nbdev-clean
	@$(BIN)/python docs/readme.py

keep:
	@$(PYTHON) docs/keep.py $(PROFILE)

clean:
	rm -rf .venv _docs _proc *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "pruning_bias needs Python 3.11 or later, found: $$($(PYTHON) --version 2>&1); try make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv .venv

.venv/%.done: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing pruning-bias[$*] into .venv (a minute or two, once)"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$*]'
	@touch $@
