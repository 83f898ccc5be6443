#!/usr/bin/env bash
# Runs the test suite on the lowest versions of the dependencies that setup.py
# allows, or on the newest in the registry. Each has an environment of its own,
# .venv-lowest and .venv-newest, made anew each time.
#
# Usage: [PYTHON=python3.12] bash scripts/versions.sh lowest|newest [FLAG]...
#
# The flags go to pytest: tests/data/test_dataset.py, -k resume, -n 0.
#
# PYTHON  the interpreter to use; otherwise python3
set -euo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
versions="${1:-}"
case "$versions" in
  # Only setup.py's own: what those depend on is not ours to bound.
  lowest) resolution=lowest-direct ;;
  newest) resolution=highest ;;
  *)
    echo "versions.sh: say lowest or newest first" >&2
    exit 2
    ;;
esac
shift

cd "$root"
venv=".venv-$versions"
echo "Installing the $versions versions into $venv (a minute or two)"
"${PYTHON:-python3}" -m venv --clear "$venv"
# pip cannot be asked for the lowest versions.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv
"$venv/bin/uv" pip install --quiet --python "$venv/bin/python" \
  --resolution "$resolution" --editable ".[test]"
"$venv/bin/uv" pip freeze --python "$venv/bin/python"
# Each process holds a JAX of its own: more than four cost more than they give.
JAX_PLATFORMS="${JAX_PLATFORMS-cpu}" exec "$venv/bin/python" -m pytest \
  --numprocesses=logical --maxprocesses=4 --dist=worksteal --durations=10 "$@"
