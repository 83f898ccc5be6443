#!/usr/bin/env bash
# Runs the linter, the type checker and the test suite. The tests run on the CPU
# unless JAX_PLATFORMS is set.
#
# Usage: bash scripts/test.sh [FLAG]...
#
# Flags are passed to pytest: tests/data/test_dataset.py, -k resume, -n 0. --slow
# also runs the tests marked slow, and compiles with XLA's default optimization.
# PYTHON and EXTRAS: see scripts/env.sh.
set -euo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
bash "$root/scripts/env.sh" test
cd "$root"
.venv/bin/python -m ruff check .
.venv/bin/python -m ruff format --check .
.venv/bin/python -m mypy
# One more than processors: some tests wait. Each process loads JAX, so more than
# four are slower.
workers="$(.venv/bin/python -c 'import os; print(min(4, os.cpu_count() + 1))')"
# Tests wait for thousands of small files to reach a disk; memory is faster.
memory=/dev/shm
if [[ -z "${TMPDIR:-}" && -w "$memory" ]] &&
  ! grep -q " $memory .*noexec" /proc/mounts &&
  (( $(df --output=avail "$memory" | tail -n 1) > 4 * 2**20 )); then
  TMPDIR="$(mktemp -d "$memory/rescalevit_jax.XXXXXX")"
  export TMPDIR
  trap 'rm -rf "$TMPDIR"' EXIT
fi
JAX_PLATFORMS="${JAX_PLATFORMS-cpu}" .venv/bin/python -m pytest \
  --numprocesses="$workers" --dist=worksteal --durations=10 \
  -o tmp_path_retention_policy=failed "$@"
