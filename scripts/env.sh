#!/usr/bin/env bash
# Makes .venv at the repository's root ready: the project, its dependencies in
# the versions of constraints.txt, and the extras asked for. Does nothing if
# all that is there already.
#
# Usage: [PYTHON=python3.12] [EXTRAS=cuda13] bash scripts/env.sh [EXTRA]...
#
# PYTHON  the interpreter to use; otherwise the first that fits of python3,
#         python3.13, python3.12 and python3.11
# EXTRAS  further extras of setup.py, separated by commas
set -euo pipefail

root="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)"
venv="$root/.venv"
stamp="$venv/.installed"     # what is installed, written when all of it is
marker="$venv/.installing"   # outlives an installation that was cut off

die() {
  echo "env.sh: $*" >&2
  exit 1
}

# Prints why the interpreter $1 won't do; prints nothing if it will.
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
    import ensurepip, venv  # Debian packages ensurepip apart from Python.
  except ImportError:
    print("lacks the venv module, on Debian and Ubuntu the package "
          "python%s-venv" % version)
' 2> /dev/null || echo "doesn't run"
}

# Prints the first interpreter that will do.
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

# Prints what an installation depends on besides the extras.
inputs() {
  echo "$(cat "$root/setup.py" "$root/constraints.txt" | cksum)" \
    "$(version "$venv/bin/python")" "$root"
}

# The interpreter that the user names is the environment's, if any is named.
right_python() {
  [[ -z "${PYTHON:-}" ||
    "$(version "$PYTHON")" == "$(version "$venv/bin/python")" ]]
}

# All is installed: the same inputs, at least the extras wanted.
ready() {
  [[ -f "$stamp" && ! -e "$marker" ]] || return 1
  [[ "$(head -n 1 "$stamp")" == "$(inputs)" ]] && right_python || return 1
  local extra
  for extra in $wanted; do
    [[ " $(tail -n 1 "$stamp") " == *" $extra "* ]] || return 1
  done
}

# The environment can be installed into; otherwise it has to be made anew.
usable() {
  [[ ! -e "$marker" ]] && right_python &&
    [[ -f "$venv/pyvenv.cfg" && -z "$(objection "$venv/bin/python")" ]] &&
    "$venv/bin/python" -c "import pip" 2> /dev/null
}

# Prints words, separated by commas or blanks, as a sorted list of each once.
sorted() {
  tr -s ', ' '\n' <<< "$*" | sort -u | xargs
}

wanted="$(sorted "$*" "${EXTRAS:-}")"
for extra in $wanted; do
  grep -q "^ *\"$extra\": \[" "$root/setup.py" ||
    die "setup.py has no extra '$extra'; see its extras_require"
done

if ready; then exit; fi

# Two installations at a time would spoil each other. Where the file system has
# no locks, they are the user's to avoid.
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
    # What was asked for once stays in step with the rest.
    everything="$(sorted "$wanted" "$(tail -n 1 "$stamp")")"
  fi
  # jax takes one of the two; none is ever uninstalled.
  if [[ "$everything" != *cuda12*cuda13* ]]; then
    anew=no
    wanted="$everything"
  fi
fi

if [[ $anew == yes ]]; then
  python="$(find_python)"
  echo "Making .venv with Python $(version "$python")"
  rm -rf "$venv"
  mkdir "$venv"
  touch "$marker"
  "$python" -m venv "$venv" || die "$python can't make an environment"
fi

packages() {
  find "$venv/lib" -maxdepth 3 -name "*.dist-info"
}

extras="${wanted:+[${wanted// /,}]}"
echo "Installing rescalevit-jax$extras (a minute or two)"
rm -f "$stamp"
touch "$marker"
# After Ctrl-C pip ends like after any error; the marker has to stay.
trap 'exit 130' INT
before="$(packages)"
cd "$root"
if ! "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    --use-pep517 --constraint constraints.txt --editable ".$extras"; then
  # What pip didn't begin to change is still whole.
  [[ "$(packages)" != "$before" ]] || rm "$marker"
  die "the installation failed: see the message above"
fi
{ inputs; echo "$wanted"; } > "$stamp.new"
mv "$stamp.new" "$stamp"
rm "$marker"
