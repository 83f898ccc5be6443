#!/usr/bin/env bash
# Builds the website of docs/ into site/; warnings are errors.
#
# Usage: bash scripts/docs.sh [COMMAND] [FLAG]...
#
# COMMAND is mkdocs' `build` (default) or `serve`.
# PYTHON and EXTRAS: see scripts/env.sh.
set -euo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
bash "$root/scripts/env.sh" docs
cd "$root"
export NO_MKDOCS_2_WARNING=1
exec .venv/bin/python -m mkdocs "${1:-build}" --strict "${@:2}"
