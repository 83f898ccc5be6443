#!/usr/bin/env bash
# Measures on a GPU within a time limit, most valuable measurements first.
#
# Usage: bash scripts/measure_gpu.sh [--wheels=DIR] [FLAG]...
#
# Flags are passed to rescalevit_jax.benchmark.measure_gpu; --help lists them.
# --wheels=DIR  missing packages (*.whl) to install offline into the user's
#               cache, for this program only
# PYTHON        the interpreter; default: .venv's if it exists, else python3
set -euo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
python="${PYTHON:-$root/.venv/bin/python}"
[[ -n "${PYTHON:-}" || -x "$python" ]] || python=python3
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

flags=()
for flag in "$@"; do
  if [[ "$flag" != --wheels=* ]]; then
    flags+=("$flag")
    continue
  fi
  wheels="${flag#--wheels=}"
  site="${XDG_CACHE_HOME:-$HOME/.cache}/rescalevit_jax/wheels"
  "$python" -m pip install --quiet --disable-pip-version-check --no-index \
    --no-deps --no-compile --upgrade --target "$site" "$wheels"/*.whl
  PYTHONPATH="$PYTHONPATH:$site"
done

exec "$python" -m rescalevit_jax.benchmark.measure_gpu "${flags[@]}"
