"""The command that compiles a config for absent GPUs."""

import json
import os

import forked
import pytest
import tiny_gpu

from rescalevit_jax.benchmark import forecast
from rescalevit_jax.benchmark import gpus
from rescalevit_jax.benchmark import speed

ROW = {
  "gpu_title": "NVIDIA L4",
  "subject": "ours",
  "norm": "LN",
  "settings": {"model.remat": True},
  "model": "ViT-B_16",
  "image_size": 224,
  "batch": 128,
  "dtype": "bfloat16",
  "attention": "cudnn",
  "memory_bytes": 9.876e9,
  "fits": True,
  "kernels": 1583,
  "launches": 2,
  "gemms": 223,
  "traffic_bytes": 80.94e9,
  "flops": 12.9e12,
  "step_seconds": 0.02921,
  "images_per_second": 4381.6,
}


def run(*args, **env):
  return forked.run(["rescalevit_jax.benchmark", *args], {**os.environ, **env})


def compile_for_h100(folder, *args, **env):
  """Return the row of a tiny model, the report and the log."""
  done = run(
    "--config=configs/quickstart.py",
    "--compile_for=h100",
    "--set=model.norm=DyT",
    "--set=model.dropout_rate=0.0",
    "--set=augment.crop=False",
    "--set=dtype=float32",
    f"--output={folder}",
    *args,
    **env,
  )
  assert done.returncode == 0, done.stderr
  (row,) = json.loads((folder / "compiled.json").read_text())["rows"]
  speed = row["batch"] / row["step_seconds"]
  assert row["images_per_second"] == pytest.approx(speed)
  assert row["dtype"] == "float32"
  text = (folder / "compiled.md").read_text()
  assert text in done.stdout and str(folder) not in text
  return row, text, done.stderr


@tiny_gpu.needs_compiler
def test_memory_and_lower_bound_are_reported(tmp_path):
  row, text, log = compile_for_h100(
    tmp_path, "--devices=2", "--set=model.num_layers=1"
  )
  limit = 0.75 * gpus.get("h100").memory_bytes
  assert row["memory_limit_bytes"] == limit > row["memory_bytes"] > 0
  assert row["fits"] and "largest_batch" not in row
  assert row["kernels"] > row["gemms"] > 0 and row["collectives"] == 1
  # Graphs before and after the all-reduce.
  assert 3 <= row["launches"] < row["kernels"]
  assert sum(row["kernel_kinds"].values()) == row["kernels"]
  assert row["flops"] > 0 and row["traffic_bytes"] > 0
  assert "2 GPUs; figures are per GPU" in text and "| yes |" in text
  assert "1/1" in log and "ETA" in log


def test_an_interrupted_command_keeps_finished_rows(tmp_path, monkeypatch):
  kernels = iter([10, 20])

  def compile_two(*args):
    if (count := next(kernels, None)) is None:
      raise KeyboardInterrupt
    return {**ROW, "kernels": count}

  monkeypatch.setattr(forecast, "_compile", compile_two)
  flags = ["--config=configs/quickstart.py", "--compile_for=h100,a100-40,t4"]
  assert speed.main([*flags, f"--output={tmp_path}"]) != 0
  rows = json.loads((tmp_path / "compiled.json").read_text())["rows"]
  assert [row["kernels"] for row in rows] == [10, 20]
  assert "Only 2 of 3 programs" in (tmp_path / "compiled.md").read_text()


@pytest.mark.slow
@tiny_gpu.needs_compiler
def test_a_smaller_batch_and_remat_are_suggested(tmp_path):
  """The share of memory is too small for the batch."""
  row, text, log = compile_for_h100(
    tmp_path,
    "--set=model.num_layers=6",
    "--set=batch=4096",
    XLA_CLIENT_MEM_FRACTION="0.002",
  )
  assert not row["fits"] and row["memory_bytes"] > row["memory_limit_bytes"]
  assert row["largest_batch"] % 8 == 0 and 64 < row["largest_batch"] < 4096
  assert row["remat_memory_bytes"] < row["memory_bytes"]
  assert row["remat_step_seconds"] > row["step_seconds"]
  assert f"no; batch {row['largest_batch']} fits; with model.remat" in text
  assert "model.remat=True" in log and f"batch={row['largest_batch']}" in log


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--compile_for=h10"], "did you mean h100"),
    (["--compile_for=h100,"], "unknown GPU ''"),
    (["--compile_for=h100", "--devices=0"], "--devices"),
    (["--compile_for=h100", "--set=dataset=nothing"], "nothing"),
    (["--compile_for=h100", "--devices=3"], "not divisible by 3 devices"),
  ],
)
def test_errors_are_one_line(flags, words, tmp_path):
  if "--devices=3" in flags and not tiny_gpu.CAN_COMPILE:
    pytest.skip(tiny_gpu.REASON)
  done = run(
    "--config=configs/quickstart.py", f"--output={tmp_path / 'o'}", *flags
  )
  assert done.returncode == 1
  line = done.stderr.splitlines()[-1]
  assert line.startswith("error: ") and words in line
  assert "Traceback" not in done.stderr
  assert not list(tmp_path.glob("o/*"))


def affine(a, b):
  """Return an affine memory function, and the list of its arguments."""
  asked = []

  def needed(batch):
    asked.append(batch)
    return a + b * batch

  return needed, asked


@pytest.mark.parametrize(
  "a, b, batch, divisor, limit, expected",
  [
    (10, 1, 128, 1, 100, 88),  # 90 fit; large results are multiples of 8.
    (10, 1, 128, 3, 100, 90),
    (10, 1, 12, 1, 15.5, 5),
    (10, 1, 12, 4, 15.5, 4),
    (10, 1, 12, 4, 13, None),
    (200, 1, 128, 1, 100, None),  # The parameters alone exceed the limit.
    (10, 1, 2, 1, 11, 1),
    (10, 1, 1, 1, 10, None),
    (200, 0, 128, 1, 100, None),
  ],
)
def test_largest_batch(a, b, batch, divisor, limit, expected):
  needed, asked = affine(a, b)
  assert forecast.largest_batch(needed, batch, divisor, limit) == expected
  assert expected is None or expected in asked  # The result was compiled.
  assert len(asked) <= 3 and max(asked, default=0) < batch


def test_largest_batch_is_corrected_if_memory_is_not_affine():
  def needed(batch):
    return batch + (20 if batch > 64 else 0)

  assert forecast.largest_batch(needed, 256, 1, 100) == 80


def test_table_has_three_significant_digits():
  report = {
    "command": "c",
    "versions": {"jax": "1"},
    "devices": 1,
    "memory_share": 0.75,
    "rows": [ROW],
  }
  text = forecast.markdown(report)
  older = {k: v for k, v in ROW.items() if k != "launches"}
  assert forecast.markdown({**report, "rows": [older]}) == text.replace(
    "| 2 |", "|  |"
  )
  assert text.splitlines()[-1] == (
    "| NVIDIA L4 | ViT-B_16 at 224 | 128, bfloat16, cudnn | ours, LN,"
    " model.remat=True | 9.88 | yes | 1583 (223) | 2 | 80.9 | 12.9 | 29.2 |"
    " 4382 |"
  )
  assert "at most 75 % of the GPU's memory" in text and "GPUs;" not in text
