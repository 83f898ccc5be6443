"""Profiles of training steps."""

import gzip
import json

import pytest

from rescalevit_jax.training import train


def files(folder):
  return sorted(p.name for p in folder.rglob("*") if p.is_file())


def test_profile_shows_the_steps_and_does_not_change_the_run(
  tiny_config, default_run, tmp_path
):
  plain = json.loads((default_run / "result.json").read_text())
  assert not (default_run / "profile").exists()
  tiny_config.profile_steps = 2
  result = train.train_and_evaluate(tiny_config, tmp_path / "run")
  assert result["last_loss"] == plain["last_loss"]
  folder = tmp_path / "run" / "profile"
  assert any(name.endswith(".xplane.pb") for name in files(folder))
  (trace,) = folder.rglob("perfetto_trace.json.gz")
  with gzip.open(trace, "rt") as f:
    events = json.load(f)["traceEvents"]
  calls = [e for e in events if "train_step" in e.get("name", "")]
  assert calls


def test_unusable_profile_folder_is_reported_at_once(tiny_config, tmp_path):
  (tmp_path / "profile").write_text("")
  tiny_config.profile_steps = 2
  with pytest.raises(OSError, match="profile"):
    train.train_and_evaluate(tiny_config, tmp_path)
  assert not (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.slow
def test_a_profile_longer_than_the_run_ends_with_it(tiny_config, tmp_path):
  tiny_config.profile_steps = 10**6
  for _ in range(2):  # The second run is already finished.
    train.train_and_evaluate(tiny_config, tmp_path)
  assert any(n.endswith(".xplane.pb") for n in files(tmp_path / "profile"))
