# make demo   five tasks of two digits each, learned one after the other by a timm network
# make test   lint, types, tests and notebooks
# make docs   the documentation site, into build/site; a warning is an error
# make lint   ruff and mypy alone
#
# Each builds its own virtual environment first, in $(VENV), and again only when pyproject.toml has changed.
# pip's own environment variables apply: PIP_INDEX_URL, for one, chooses a CPU-only build of PyTorch.

PYTHON ?= python3
VENV ?= .venv
python := $(VENV)/bin/python

.PHONY: demo test lint docs clean

demo: $(VENV)/.installed-demo
	$(python) benchmarks/digits_demo.py --output digits_demo.png

# One thread per worker: two workers with a thread pool each would fight over the cores.
test: lint
	OMP_NUM_THREADS=1 $(python) -m pytest -n 2
	OMP_NUM_THREADS=1 $(python) -m pytest -n 2 --nbmake --nbmake-timeout=300 notebooks

lint: $(VENV)/.installed-test
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy hatify

# The theme announces its successor; that is no fault of these pages.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(python) -m mkdocs build --strict

clean:
	rm -rf .venv build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis digits_demo.png

$(VENV)/.installed-%: pyproject.toml | $(VENV)/.created
	$(python) -m pip install -e '.[$*]'
	@touch $@

# The stamp is written last, so that an environment left half-made by an interruption is made again.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo 'hatify needs Python 3.10 or newer; name one: make PYTHON=/path/to/python3.12' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo 'no virtual environment (on Debian and Ubuntu: apt install python3-venv)' >&2; exit 1; }
	$(python) -m pip install --quiet --upgrade pip
	@touch $@
