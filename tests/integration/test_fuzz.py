"""Hostile inputs; `python tests/fuzz` tries millions."""

import sys

from fuzz import archive
from fuzz import choices
from fuzz import flags
from fuzz import image
from fuzz import judge
from fuzz import npz
import hypothesis
from hypothesis import strategies as st
import pytest

TARGETS = (archive, flags, image, npz)


@pytest.mark.skipif(sys.platform != "linux", reason="limits as of Linux")
@pytest.mark.parametrize("target", TARGETS, ids=lambda t: t.__name__)
def test_any_input_is_read_or_refused_in_one_line(target, tmp_path):
  outcomes = set()

  @hypothesis.settings(
    max_examples=400, deadline=None, database=None, derandomize=True
  )
  @hypothesis.given(st.binary(max_size=200))
  def check(data):
    content = target.build(choices.Choices(data))
    outcomes.add(judge.judge(target, content, tmp_path))

  with judge.limited():
    check()
  # Inputs pass the first checks along many paths.
  assert "read" in outcomes and len(outcomes) > 15, outcomes
