"""Update the tables of config keys in a Markdown page.

python -m rescalevit_jax.config docs/configuration.md

A table stands between `<!-- keys: PATTERN ... -->` and `<!-- end -->` and has
the keys whose names match one of the patterns. A page shows each key once.
"""

from collections.abc import Sequence
import fnmatch
import pathlib
import re
import sys

from rescalevit_jax import errors
from rescalevit_jax.config import keys
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import cli

_TABLE = re.compile(r"(<!-- keys: ([^\n]*) -->\n).*?(<!-- end -->)", re.DOTALL)
_HEAD = "| key | default | meaning |\n|---|---|---|\n"
_ROW = "| `{name}` | `{default}` | {meaning} |"


def main(argv: Sequence[str] | None = None) -> int:
  """Update the page; return the exit code."""
  parser = cli.parser(__doc__)
  parser.add_argument("page", type=pathlib.Path)
  page = parser.parse_args(argv).page
  return cli.run(lambda: _update(page))


def _update(page):
  atomic_file.write(page, fill(page.read_text(encoding="utf-8")))


def fill(text: str) -> str:
  """Return a page's text with up-to-date tables."""
  shown: list[str] = []

  def table(match):
    patterns = match[2].split()
    names = [
      name
      for name in keys.KEYS
      if any(fnmatch.fnmatchcase(name, x) for x in patterns)
    ]
    shown.extend(names)
    return f"{match[1]}\n{_HEAD}{keys.describe(_ROW, names)}\n\n{match[3]}"

  filled = _TABLE.sub(table, text)
  if wrong := [name for name in keys.KEYS if shown.count(name) != 1]:
    raise errors.UserError(
      f"{wrong[0]}: is in {shown.count(wrong[0])} tables of the page; change"
      " the patterns in its <!-- keys: ... --> comments"
    )
  return filled


if __name__ == "__main__":
  sys.exit(main())
