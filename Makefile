# Each target sets up what it needs in $(VENV): on a fresh machine one command suffices.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The committed reference alone, whatever lies among your local runs, and no progress bars or widgets.
CLEAN_RUNS := STABILITY_LIB_HEADLESS=1 STABILITY_LIB_RUNS=$$(mktemp -d)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help reproduce test lab reference promote notebooks site audit benchmark gpu-check lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

reproduce: $(VENV)/ready  ## train every notebook from scratch at scale quick; executed notebooks and report.html in reports/quick
	$(BIN)/python -m stability_lib reproduce --scale quick --recompute all

test: $(VENV)/ready-test  ## run pytest, then every committed notebook against its committed outputs
	$(BIN)/python -m ruff check .
	$(CLEAN_RUNS) $(BIN)/python -m pytest
	$(CLEAN_RUNS) $(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=300 -p no:warnings notebooks

lab: $(VENV)/ready  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

SCALE ?= cpu
reference: $(VENV)/ready  ## train the committed reference again (about two and a half hours on 2 cores; it can be interrupted and goes on)
	$(BIN)/python -m stability_lib reference --scale $(SCALE)

promote: $(VENV)/ready  ## make your local runs of a study the committed reference: make promote STUDY=... SCALE=gpu
	$(BIN)/python -m stability_lib promote $(STUDY) --scale $(SCALE)

notebooks: $(VENV)/ready  ## execute the committed notebooks in place, renew what is drawn and told from them: README, docs/figures, docs/which_remedy.md
	$(CLEAN_RUNS) $(BIN)/jupyter nbconvert --to notebook --execute --inplace notebooks/*.ipynb
	$(BIN)/python -c "from pathlib import Path; from stability_lib import batch; Path('docs/figure1.png').write_bytes(batch.readme_figure())"
	$(BIN)/python -m stability_lib remedies-page
	$(BIN)/python -m stability_lib findings
	$(BIN)/python -m stability_lib figures

site: $(VENV)/ready-site  ## build the book of chapters, docs and docstrings: reports/site/index.html, no network needed
	rm -rf docs/api reports/site
	$(CLEAN_RUNS) $(BIN)/python -m sphinx -W --keep-going -q -c docs -d reports/site-doctrees . reports/site

N ?= 5
audit: $(VENV)/ready  ## train N random reference runs again and compare: make audit N=5
	$(BIN)/python -m stability_lib audit --n $(N) --scale $(SCALE)

benchmark: $(VENV)/ready-test  ## measure training, probes, spectral profile and shaping; ratios from one run
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/koopman.py
	$(BIN)/python benchmarks/shaping.py

gpu-check: $(VENV)/ready-test  ## on a machine with a CUDA device: the tests of it, then the replica benchmark (docs/gpu.md)
	$(CLEAN_RUNS) $(BIN)/python -m pytest -m gpu -W default tests/test_gpu.py
	$(BIN)/python benchmarks/replicas.py --device cuda --seconds 75

lock: $(VENV)/ready-test  ## write requirements.lock from what is installed in $(VENV)
	$(BIN)/python -m pip freeze --all --exclude-editable > $(VENV)/frozen
	grep -v -f requirements-nodeps.txt -e '^pip==' $(VENV)/frozen | sed 's/+cpu$$//' > requirements.lock

clean:  ## remove the virtual environment and the reports, not your runs
	rm -rf $(VENV) reports

$(VENV)/ready: pyproject.toml requirements.lock requirements-nodeps.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) --constraint requirements.lock --editable '.[pretrained,lightning]'
	$(PIP_INSTALL) --no-deps --requirement requirements-nodeps.txt
	touch $@

$(VENV)/ready-test: $(VENV)/ready
	$(PIP_INSTALL) --constraint requirements.lock --editable '.[test]'
	touch $@

$(VENV)/ready-site: $(VENV)/ready
	$(PIP_INSTALL) --constraint requirements.lock --editable '.[site]'
	touch $@
