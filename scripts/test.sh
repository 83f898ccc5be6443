#!/usr/bin/env bash
# Runs the linter and the whole test suite, on the CPU unless JAX_PLATFORMS says
# otherwise.
#
# Usage: bash scripts/test.sh [FLAG]...
#
# The flags go to pytest: tests/data/test_dataset.py, -k resume, -n 0. --slow adds the
# tests marked slow, which are skipped without it, and lets XLA optimize what it
# compiles as it does for users.
# PYTHON and EXTRAS: see scripts/env.sh.
set -euo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
bash "$root/scripts/env.sh" test
cd "$root"
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
# Each process holds a JAX of its own: more than four cost more than they give.
JAX_PLATFORMS="${JAX_PLATFORMS-cpu}" exec .venv/bin/python -m pytest \
  --numprocesses=logical --maxprocesses=4 --dist=worksteal --durations=10 "$@"
