"""Mean and standard deviation of a converted model's inputs."""

import json

import numpy as np
import pytest

from rescalevit_jax import errors
from rescalevit_jax.pretrained import input_stats


@pytest.mark.parametrize(
  "mean, std", [("123.7,116.3,103.5", "58"), ("0.5", "1.5"), ("-1", "1")]
)
def test_values_for_other_pixels_are_refused(mean, std, tmp_path):
  words = r"must be for pixels in \[0, 1\]; divide .* by 255"
  with pytest.raises(errors.UserError, match=words):
    input_stats.parse(mean, std)
  numbers = {"mean": json.loads(f"[{mean}]"), "std": json.loads(f"[{std}]")}
  config = {"pretrained_cfg": numbers}
  with pytest.raises(errors.UserError, match=f"JSON file beside it {words}"):
    input_stats.find(tmp_path / "a.safetensors", config)


def test_values_are_broadcast_to_the_channels(tmp_path):
  for mean, std in (
    input_stats.parse("0.5", "0.1,0.2,1"),
    input_stats.find(
      tmp_path / "a.safetensors",
      {"pretrained_cfg": {"mean": [0.5], "std": [0.1, 0.2, 1]}},
    ),
  ):
    np.testing.assert_array_equal(mean, [0.5] * 3)
    np.testing.assert_array_equal(std, [0.1, 0.2, 1])
