"""Markdown."""

import html

NOTHING = "–"


def escape(text: str) -> str:
  """Escapes what Markdown would take for a cell's border or for HTML."""
  text = html.escape(" ".join(text.split()), quote=False)
  for character in "\\|`*":
    text = text.replace(character, f"\\{character}")
  return text
