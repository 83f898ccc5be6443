#!/usr/bin/env bash
# Runs the test suite with the lowest versions of the dependencies that setup.py
# allows, or with the newest ones in the registry. Recreates the environment
# .venv-lowest or .venv-newest.
#
# Usage: [PYTHON=python3.12] bash scripts/versions.sh lowest|newest [FLAG]...
#
# Flags are passed to pytest: tests/data/test_dataset.py, -k resume, -n 0.
#
# PYTHON  the interpreter; default: python3
set -euo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
versions="${1:-}"
case "$versions" in
  # Direct dependencies only; setup.py does not bound transitive ones.
  lowest) resolution=lowest-direct ;;
  newest) resolution=highest ;;
  *)
    echo "versions.sh: no versions; give lowest or newest" >&2
    exit 2
    ;;
esac
shift

cd "$root"
venv=".venv-$versions"
echo "Installing the $versions versions into $venv (a minute or two)"
"${PYTHON:-python3}" -m venv --clear "$venv"
# pip cannot select the lowest versions.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" \
  --resolution "$resolution" --editable ".[test]"
"$venv/bin/uv" pip freeze --python "$venv/bin/python"
# Each process loads JAX, so more than four are slower.
JAX_PLATFORMS="${JAX_PLATFORMS-cpu}" exec "$venv/bin/python" -m pytest \
  --numprocesses=logical --maxprocesses=4 --dist=worksteal --durations=10 "$@"
