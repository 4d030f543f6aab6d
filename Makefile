# make setup, train and test set up .venv, if it is missing or older than the requirements.
# pip would compile all modules on one core; compileall takes all cores. Some files are templates
# that no Python can compile.
EXTRAS := $(shell nvidia-smi >/dev/null 2>&1 && echo dev,cuda12 || echo dev)
ARGS ?=

setup: .venv/installed

train: .venv/installed
	.venv/bin/python launch.py --config experiments/alexnet_cifar.py $(ARGS)

test: .venv/installed
	.venv/bin/python -m pytest $(ARGS)

.venv/installed: pyproject.toml requirements-cpu.txt requirements-cuda12.txt requirements-dev.txt
	@set -e; ok='import sys; sys.exit(sys.version_info < (3, 11))'; \
	if [ ! -x .venv/bin/python ]; then \
	  for python in python3 python3.13 python3.12 python3.11 none; do \
	    if $$python -c "$$ok" 2>/dev/null; then break; fi; \
	  done; \
	  if [ $$python = none ]; then \
	    echo "error: Python 3.11 or newer is needed; python3 is $$(python3 --version 2>&1 || true)" >&2; exit 1; \
	  fi; \
	  $$python -m venv .venv; \
	fi; \
	.venv/bin/python -c "$$ok" || { echo "error: .venv has $$(.venv/bin/python --version), Python 3.11 or newer is needed: remove .venv" >&2; exit 1; }
	.venv/bin/python -m pip install --quiet --no-compile --editable '.[$(EXTRAS)]'
	@.venv/bin/python -m compileall -qq -j 0 .venv/lib || true
	@touch $@

.PHONY: setup train test
