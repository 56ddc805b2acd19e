# Everything on a machine with only Python 3.11 or newer: the environment lies in .venv, and a second call starts at once.
# PIP_FIND_LINKS (a folder of wheels, such as a CPU build of torch) is handed on to uv, which does the installing.

.PHONY: demo teacher test check install clean
.DEFAULT_GOAL := test

# Without bytecode every process that a test starts would compile torch and diffusers anew, ten seconds each.
unexport PYTHONDONTWRITEBYTECODE

INSTALLED := .venv/.installed
empty :=
comma := ,
export UV_FIND_LINKS ?= $(subst $(empty) $(empty),$(comma),$(strip $(PIP_FIND_LINKS)))

demo: $(INSTALLED) ## the whole chain on real captioned pictures, in minutes, on a CPU
	.venv/bin/distill demo

teacher: $(INSTALLED) ## the tiny teacher of the demo from scratch, in hours
	.venv/bin/distill demo --recipe tiny-teacher.yaml

test: check ## everything CI runs
	.venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20

check: $(INSTALLED) ## style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

install: $(INSTALLED)

# python3.11 goes first because the constraints were made with it; a name that is only a launcher's stub fails the version check.
$(INSTALLED): pyproject.toml constraints.txt
	@for python in $(PYTHON) python3.11 python3.12 python3.13 python3 python; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' </dev/null >/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "no Python 3.11 or newer on the path; name one: make PYTHON=/path/to/python3" >&2; exit 2; fi; \
	if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then rm -rf .venv; "$$found" -m venv .venv; fi
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt uv
	[ -n "$$UV_FIND_LINKS" ] || unset UV_FIND_LINKS; .venv/bin/uv pip install --python .venv/bin/python -c constraints.txt -e '.[dev]'
	@touch $@

clean: ## forget the environment, the caches and the demo's results
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info demo
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
