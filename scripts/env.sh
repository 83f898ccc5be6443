#!/usr/bin/env bash
# Creates or updates .venv at the repository's root: the project, its
# dependencies in the versions of constraints.txt, and the given extras. A no-op
# if everything is installed.
#
# Usage: [PYTHON=python3.12] [EXTRAS=cuda13] bash scripts/env.sh [EXTRA]...
#
# PYTHON  the interpreter; default: the first suitable one of python3,
#         python3.13, python3.12 and python3.11
# EXTRAS  more extras of setup.py, separated by commas
set -euo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
stamp="$venv/.installed"     # inputs and extras of a complete installation
marker="$venv/.installing"   # remains after an interrupted installation

die() {
  echo "env.sh: $*" >&2
  exit 1
}

# Prints why the interpreter $1 is unsuitable, or nothing if it is suitable.
objection() {
  command -v "$1" > /dev/null || { echo "is missing"; return; }
  "$1" -c '
import sys
version = "%d.%d" % sys.version_info[:2]
# TensorFlow has no wheels beyond 3.13.
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
  print("is Python " + version)
else:
  try:
    import ensurepip, venv  # A separate package on Debian.
  except ImportError:
    print("lacks the venv module, on Debian and Ubuntu the package "
          "python%s-venv" % version)
' 2> /dev/null || echo "doesn't run"
}

# Prints the first suitable interpreter.
find_python() {
  local candidates=(python3 python3.13 python3.12 python3.11)
  [[ -z "${PYTHON:-}" ]] || candidates=("$PYTHON")
  local candidate reason reasons=""
  for candidate in "${candidates[@]}"; do
    reason="$(objection "$candidate")"
    if [[ -z "$reason" ]]; then
      echo "$candidate"
      return
    fi
    reasons+="${reasons:+, }$candidate $reason"
  done
  die "needs Python 3.11, 3.12 or 3.13: $reasons; install one or name it" \
    "with PYTHON=/path/to/python"
}

version() {
  "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2> /dev/null
}

# Prints the inputs of an installation besides the extras.
inputs() {
  echo "$(cat "$root/setup.py" "$root/constraints.txt" | cksum)" \
    "$(version "$venv/bin/python")" "$root"
}

# Succeeds unless PYTHON names another version than the environment's.
right_python() {
  [[ -z "${PYTHON:-}" ||
    "$(version "$PYTHON")" == "$(version "$venv/bin/python")" ]]
}

# Succeeds if the same inputs and at least the wanted extras are installed.
ready() {
  [[ -f "$stamp" && ! -e "$marker" ]] || return 1
  [[ "$(head -n 1 "$stamp")" == "$(inputs)" ]] && right_python || return 1
  local extra
  for extra in $wanted; do
    [[ " $(tail -n 1 "$stamp") " == *" $extra "* ]] || return 1
  done
}

# Succeeds if the environment can be updated; otherwise it is recreated.
usable() {
  [[ ! -e "$marker" ]] && right_python &&
    [[ -f "$venv/pyvenv.cfg" && -z "$(objection "$venv/bin/python")" ]] &&
    "$venv/bin/python" -c "import pip" 2> /dev/null
}

# Prints words, separated by commas or spaces, sorted and without duplicates.
sorted() {
  tr -s ', ' '\n' <<< "$*" | sort -u | xargs
}

wanted="$(sorted "$*" "${EXTRAS:-}")"
for extra in $wanted; do
  grep -q "^ *\"$extra\": " "$root/setup.py" ||
    die "setup.py has no extra '$extra'; see its extras_require"
done

if ready; then exit; fi

# Concurrent installations would corrupt each other. Without file locks the user
# must avoid them.
if command -v flock > /dev/null; then
  exec 9>> "$root/setup.py"
  flock --nonblock 9 || {
    echo "Waiting for the installation that is running"
    flock 9 || true
    if ready; then exit; fi
  }
fi

anew=yes
if usable; then
  everything="$wanted"
  if [[ -f "$stamp" ]]; then
    # Update the extras of earlier installations, too.
    everything="$(sorted "$wanted" "$(tail -n 1 "$stamp")")"
  fi
  # jax supports only one of the two, and pip does not uninstall the other.
  if [[ "$everything" != *cuda12*cuda13* ]]; then
    anew=no
    wanted="$everything"
  fi
fi

if [[ $anew == yes ]]; then
  python="$(find_python)"
  echo "Creating .venv with Python $(version "$python")"
  rm -rf "$venv"
  mkdir "$venv"
  touch "$marker"
  "$python" -m venv "$venv" || die "$python cannot create an environment"
fi

packages() {
  find "$venv/lib" -maxdepth 3 -name "*.dist-info"
}

extras="${wanted:+[${wanted// /,}]}"
echo "Installing rescalevit-jax$extras (a minute or two)"
rm -f "$stamp"
touch "$marker"
# pip exits as after an error on Ctrl-C, but the marker must remain.
trap 'exit 130' INT
before="$(packages)"
cd "$root"
if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --use-pep517 --constraint constraints.txt --editable ".$extras"; then
  # An environment that pip has not changed is still valid.
  [[ "$(packages)" != "$before" ]] || rm "$marker"
  die "the installation failed: see the message above"
fi
{ inputs; echo "$wanted"; } > "$stamp.new"
mv "$stamp.new" "$stamp"
rm "$marker"
