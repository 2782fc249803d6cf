# make pretrain   set up .venv and train a Diff-ViT on the embedded sample
# make test       the tests, a quarter of an hour; make test-fast: those that need neither Ray nor seconds
# make test-faults   commands, workers and nodes killed at every moment that could be a bad one, for minutes
# make test-cluster  `ray up` on several hosts, made of namespaces (root on Linux, sshd, rsync; else they skip)
# make lint       ruff, mypy, import-linter
# make clean      remove what these made, but not runs/

PYTHON ?= python3
ARGS ?=

.PHONY: pretrain test test-fast test-faults test-cluster lint clean

pretrain: .venv/installed
	.venv/bin/python ray_jobs/pretrain.py $(ARGS)

test: .venv/installed-dev
	.venv/bin/python -m pytest -m "not faults" $(ARGS)

test-fast: .venv/installed-dev
	.venv/bin/python -m pytest -m "not ray and not slow and not faults" $(ARGS)

test-faults: .venv/installed-dev
	.venv/bin/python -m pytest -m faults $(ARGS)

test-cluster: .venv/installed-dev
	.venv/bin/python -m pytest tests/cluster $(ARGS)

lint: .venv/installed-dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

# pip and not uv, because pip looks in the places that pip.conf names for wheels
.venv/installed: pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "diffvit needs Python 3.11 or newer; call make with PYTHON=python3.11")'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --constraint requirements.lock --editable .
	touch $@

.venv/installed-dev: .venv/installed
	.venv/bin/python -m pip install --quiet --constraint requirements.lock --editable '.[dev]'
	touch $@
