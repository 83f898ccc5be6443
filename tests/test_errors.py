"""Short messages for exceptions of other libraries."""

import pytest
import tensorstore

from rescalevit_jax import errors


def test_brief_keeps_the_cause_of_a_long_message():
  spec = {
    "driver": "zarr",
    "kvstore": {"driver": "file", "path": "/proc/nowhere/x/"},
    "metadata": {"shape": [3], "dtype": "<f4", "chunks": [3]},
  }
  with pytest.raises(ValueError, match="tensorstore_spec") as caught:
    tensorstore.open(spec, create=True).result()
  text = errors.brief(caught.value)
  assert "No such file or directory" in text and "cache_pool" not in text
  text = errors.brief(ValueError("of a library " + 1000 * "x" + " the cause"))
  assert len(text) < 320
  assert text.startswith("of a library") and text.endswith("the cause")
