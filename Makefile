# Two commands do everything on a machine with Python and make: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
SETUP  := settings.ini setup.py pyproject.toml

.DEFAULT_GOAL := help
.PHONY: help demo docs test test-slow test-gpu test-machines test-oldest test-newest bench bench-quick bench-quality bench-methods check lab readme clean

help:                                 ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 16

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(SETUP) | $(BIN)/python
	@echo 'Installing into $(VENV): PyTorch is large, this takes a few minutes'
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.installed-dev: $(SETUP) | $(BIN)/python
	@echo 'Installing into $(VENV): PyTorch is large, this takes a few minutes'
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@ $(VENV)/.installed

$(VENV)/.installed-docs: $(SETUP) | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[docs]'
	touch $@ $(VENV)/.installed

demo: $(VENV)/.installed              ## handwritten digits: pretrain, select 50, label, fine-tune, predict, measure
	rm -rf runs/demo
	$(BIN)/python tools/demo.py digits runs/demo
	$(BIN)/swav pretrain runs/demo/photos --out runs/demo/run --epochs 40 --valid-pct 0.05 --set flip_p=0 'encoder.layers=(1,1,1,1)' 'encoder.channels=(16,32,64,128)'
	$(BIN)/swav select runs/demo/run runs/demo/photos --number 50 --out runs/demo/selected.csv
	$(BIN)/python tools/demo.py label runs/demo
	$(BIN)/swav finetune runs/demo/run runs/demo/labels.csv --folder runs/demo/photos --out runs/demo/classifier
	$(BIN)/swav predict runs/demo/classifier runs/demo/held_out --out runs/demo/predictions.csv
	$(BIN)/python tools/demo.py score runs/demo

test: $(VENV)/.installed-dev          ## everything that must hold before a change lands
	$(BIN)/python tools/test.py

test-slow: $(VENV)/.installed-dev $(VENV)/.installed-docs  ## the tests marked slow
	$(BIN)/python -m pytest -q -m slow tests

test-gpu: $(VENV)/.installed-dev      ## the tests that need a GPU, where there is one
	$(BIN)/python tools/gpu.py

test-machines: $(VENV)/.installed-dev ## numeric tests and trainings as other machines would run them: an hour and a half
	$(BIN)/python tools/machines.py

test-oldest:                          ## tests with the lowest versions that settings.ini promises, on the lowest Python
	$(PYTHON) tools/versions.py oldest

test-newest:                          ## tests with the newest of everything, on the newest Python
	$(PYTHON) tools/versions.py newest

bench: $(VENV)/.installed-dev         ## this package beside its peers, kept in benchmarks/README.md
	$(BIN)/python -W ignore benchmarks/run.py --write

bench-quick: $(VENV)/.installed-dev   ## the same in under three minutes, only printed
	$(BIN)/python -W ignore benchmarks/run.py --quick

bench-quality: $(VENV)/.installed-dev  ## what the features are worth on Fashion-MNIST, beside lightly's: about an hour, in pieces
	$(BIN)/python -W ignore benchmarks/quality.py --write

bench-methods: $(VENV)/.installed-dev  ## SwAV beside SimCLR, MoCo, DeepCluster-v2 and lightly's: in pieces that are not done twice
	$(BIN)/python -W ignore benchmarks/methods.py --write

check: $(VENV)/.installed-dev         ## are the package and README what the notebooks give?
	$(BIN)/python tools/drift.py

readme: $(VENV)/.installed-dev        ## compile the notebooks: package and README
	$(BIN)/nbdev-export && $(BIN)/nbdev-clean && $(BIN)/python tools/readme.py

docs: $(VENV)/.installed-docs         ## the documentation, as pages in _site/
	$(BIN)/python tools/docs.py

lab: $(VENV)/.installed-dev           ## notebooks in the browser
	$(BIN)/python -m pip install -q jupyterlab
	$(BIN)/jupyter lab nbs

clean:                                ## everything that these commands made
	rm -rf _site $(VENV) .venv-oldest .venv-newest runs build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
