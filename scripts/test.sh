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
# One worker more than processors, since some tests wait. At most four, since each
# loads JAX.
workers="$(.venv/bin/python -c 'import os; print(min(4, os.cpu_count() + 1))')"
# Tests write thousands of small files: faster in memory, if 4 GiB are free there.
memory=/dev/shm
free="$(df -Pk "$memory" 2> /dev/null | awk 'END {print $4 + 0}')"
if [[ -z "${TMPDIR:-}" && -w "$memory" && "$free" -gt 4194304 ]] &&
  ! grep -q " $memory .*noexec" /proc/mounts; then
  export TMPDIR="$memory"
fi
# Compile the package's modules once, not in each of hundreds of processes.
unset PYTHONDONTWRITEBYTECODE
# Only the files of failed tests are kept.
JAX_PLATFORMS="${JAX_PLATFORMS-cpu}" exec .venv/bin/python -m pytest \
  --numprocesses="$workers" --dist=worksteal --durations=10 \
  -o tmp_path_retention_policy=failed -o tmp_path_retention_count=1 "$@"
