# The book from a fresh clone: `make test` proves it, `make demo` shows it. `make` alone lists the targets.

# What setup looks for, in this order; `make setup PYTHON=/path/to/python3.12` names one.
PYTHON ?= python3 python3.13 python3.12 python3.11
UV_VERSION := 0.13.8

.DEFAULT_GOAL := help
.PHONY: help setup test check demo readme clean

help: ## list these targets
	@sed -n 's/^\([a-z]*\):.*## /make \1: /p' Makefile

setup: .venv/.installed ## make .venv with all that the book needs (once; needs PyPI)

test: setup ## the gates: notebooks, wheel (minutes, on a CPU, offline)
	@.venv/bin/python .ci/gates.py test

check: setup ## the long checks: the exported package, slow cells, the demo, real data where PYTC_DATA names it
	@.venv/bin/python .ci/gates.py check

demo: setup ## segment a small volume, from nothing to a score
	@.venv/bin/pytc demo

readme: setup ## write README.md from nbs/index.ipynb
	@.venv/bin/python .ci/readme.py

clean: ## remove .venv and what builds leave behind
	rm -rf .venv build dist *.egg-info _docs _proc

# The stamps .locked and .installed are written last, so an interrupted setup is taken up again (downloads are kept);
# .venv/.installing is left only by a kill in the middle, after which a package may be half there: the environment is made anew.
.venv/.locked: requirements.lock
	@set -e; \
	if [ -e .venv/.installing ] || ! .venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  for python in $(PYTHON) ""; do \
	    if "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then break; fi; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "setup needs Python 3.11, 3.12 or 3.13 and found none as $(PYTHON); install one, or name it: make setup PYTHON=/path/to/python3" >&2; exit 1; \
	  fi; \
	  if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	    package=$$("$$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])'); \
	    echo "setup found $$python, but it cannot make a virtual environment; on Debian or Ubuntu: apt install $$package" >&2; exit 1; \
	  fi; \
	  "$$python" -m venv --clear .venv; \
	fi; \
	if ! .venv/bin/python -m pip install --quiet --retries 2 uv==$(UV_VERSION) >.venv/setup.log 2>&1; then \
	  if grep -q 'Retrying' .venv/setup.log; then echo "setup needs PyPI once; could not reach it. Connect, then run make setup again." >&2; \
	  else cat .venv/setup.log >&2; fi; \
	  exit 1; \
	fi; \
	cache=$$(.venv/bin/uv cache dir); mkdir -p "$$cache"; touch "$$cache/.link"; \
	if [ -z "$$UV_LINK_MODE" ] && ! ln -f "$$cache/.link" .venv/.link 2>/dev/null; then export UV_LINK_MODE=copy; fi; \
	touch .venv/.installing; \
	if ! .venv/bin/uv pip install --python .venv/bin/python --requirement requirements.lock; then \
	  rm -f .venv/.installing; \
	  echo "setup stopped, see above. If PyPI could not be reached: connect, then run make setup again; what was fetched is kept." >&2; exit 1; \
	fi; \
	rm -f .venv/.installing; touch $@

.venv/.installed: .venv/.locked settings.ini setup.py
	@.venv/bin/uv pip install --quiet --offline --python .venv/bin/python --no-deps --no-build-isolation --reinstall-package pytc --editable .
	@touch $@
