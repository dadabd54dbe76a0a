# One command each. Everything runs inside .venv, which the first target makes.
SHELL := /bin/bash
PYTHON ?= python3.11
BIN := .venv/bin
# DVC starts its stages with `python`, so the environment must come first on the path
export PATH := $(CURDIR)/$(BIN):$(PATH)
export DVC_NO_ANALYTICS := 1

.PHONY: help venv data repro test test-slow smoke readme export

help:    ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*##/ {printf "%-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: .venv/installed    ## the environment with pinned versions (about 2 minutes)

.venv/installed: pyproject.toml requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c requirements.txt -e ".[test]"
	touch $@

data: venv    ## the embedded data, from the store in this repository
	dvc pull --quiet data.dvc

repro: data    ## the whole pipeline, from labelled scenes to the report
	dvc repro

test: data    ## the notebooks but for their slow cells, then the contracts in tests/
	OMP_NUM_THREADS=1 nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 python -m pytest -n 2 --dist loadfile

test-slow: data    ## the notebooks with their slow cells, which `make test` leaves out
	OMP_NUM_THREADS=1 nbdev_test --flags slow --n_workers 2

smoke: data    ## the whole pipeline at a toy size, in a throw-away copy
	python -m segsyn.run --profile smoke

readme: venv    ## README.md from nbs/index.ipynb
	python -m segsyn.report readme

export: venv    ## segsyn/*.py from the notebooks, and notebooks without noise
	nbdev_export
	nbdev_clean
