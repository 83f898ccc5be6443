"""The command line with real processes and signals."""

import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import forked
import jax
import numpy as np
import paths
import pytest
import tiny_sweep

from rescalevit_jax.config import keys as keys_lib
from rescalevit_jax.runs import checkpoint

TINY = (
  # It has running statistics, but one training step where Rescale has two.
  "model.norm=BN",
  "model.patch_size=4",
  "model.hidden_size=16",
  "model.mlp_dim=32",
  "model.num_heads=2",
  "model.num_layers=1",
  "batch=48",
  "total_steps=12",
  "warmup_steps=3",
  "eval_every=5",
  "progress_every=2",
  "checkpoint_every=4",
)


@pytest.fixture(scope="module", autouse=True)
def environment(shared_dir):
  """Set environment variables for processes that start fast."""
  with pytest.MonkeyPatch.context() as patch:
    for name, value in tiny_sweep.environment(shared_dir).items():
      patch.setenv(name, value)
    yield


def command(*args, config="configs/quickstart.py", keys=()):
  keys = [f"--config.{k}" for k in keys]
  config = [f"--config={config}"] if config else []
  return [sys.executable, "-m", "rescalevit_jax.main", *config, *keys, *args]


def run(*args, env=None, **kwargs):
  """Run a command in a forked process."""
  environment = {**os.environ, **(env or {})}
  return forked.run(command(*args, **kwargs)[2:], environment)


def run_anew(*args, env=None, preexec_fn=None, **kwargs):
  """Run a command in a new process, as users do."""
  return subprocess.run(
    command(*args, **kwargs),
    cwd=paths.ROOT,
    env={**os.environ, **(env or {})},
    capture_output=True,
    text=True,
    timeout=300,
    preexec_fn=preexec_fn,
    check=False,
  )


def assert_one_line_error(done, *words):
  """Check that a process failed with a one-line error."""
  assert done.returncode not in (0, None)
  assert "Traceback" not in done.stderr
  errors = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
  assert len(errors) == 1 and errors[0] == done.stderr.splitlines()[-1]
  for word in words:
    assert word in errors[0], errors[0]


def snapshot(folder):
  return {
    str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
    for p in pathlib.Path(folder).rglob("*")
  }


@pytest.fixture
def tiny(digits_dir):
  return (*TINY, f"tfds_data_dir={digits_dir}")


def test_help_names_every_flag_and_key():
  done = run_anew("--help", config=None)
  assert "--config" in done.stdout and "--workdir" in done.stdout
  assert "--mode" in done.stdout
  for key in keys_lib.KEYS:
    assert key in done.stdout


@pytest.mark.parametrize(
  "args, keys, words",
  [
    ((), ["model.nrom=BN"], ["model.nrom", "model.norm"]),
    ((), ["modle.norm=BN"], ["modle.norm", "model.norm"]),
    ((), ["btach=3"], ["btach", "batch"]),
    ((), ["pretrained_path="], ["pretrained_path is empty"]),
    ((), ["model=3"], ["model"]),
    ((), ["model.norm=layernorm"], ["model.norm", "valid: LN, BN"]),
    ((), ["model_name=ViT-B16"], ["ViT-B_16"]),
    ((), ["batch=abc"], ["batch", "abc"]),
    ((), ["batch=1.5"], ["batch", "1.5"]),
    ((), ["batch=0"], ["batch is 0", "> 0"]),
    ((), ["base_lr=-1"], ["base_lr is -1", "> 0"]),
    ((), ["accum_steps=7"], ["accum_steps"]),
    ((), ["image_size=9"], ["image_size", "patch"]),
    ((), ["model.num_heads=5"], ["heads"]),
    ((), ["model.norm=GN", "model.hidden_size=18"], ["GN"]),
    ((), ["dataset=cifar11"], ["cifar11", "cifar10"]),
    ((), ["pretrained_path=none.npz"], ["none.npz"]),
    (("--mode=test",), [], ["mode"]),
    (("--wrkdir=a",), [], ["wrkdir", "workdir"]),
    (("stray",), [], ["stray"]),
  ],
)
def test_invalid_flags_are_one_line_errors(args, keys, words, tiny, tmp_path):
  workdir = tmp_path / "run"
  done = run(f"--workdir={workdir}", *args, keys=[*tiny, *keys])
  assert_one_line_error(done, *words)
  assert not workdir.exists()


@pytest.mark.parametrize(
  "text, words",
  [
    (None, ["No such file"]),
    ("def get_config(:\n", ["SyntaxError"]),
    ("def get_config():\n  return 1 / 0\n", ["ZeroDivisionError", ":2"]),
    ("x = 1\n", ["get_config"]),
    ("def get_config():\n  return None\n", ["get_config"]),
    (
      "from rescalevit_jax import config\n"
      "def get_config():\n"
      "  c = config.default()\n  c.nrom = 'LN'\n  return c\n",
      ["nrom"],
    ),
  ],
)
def test_errors_in_a_config_file_are_one_line(text, words, tmp_path):
  path = tmp_path / "config.py"
  if text is not None:
    path.write_text(text)
  assert_one_line_error(run(config=path), *words)


def test_a_config_or_an_existing_run_is_required(tmp_path):
  assert_one_line_error(run(config=None), "--config")
  done = run(f"--workdir={tmp_path}", config=None)
  assert_one_line_error(done, str(tmp_path), "--config")


def test_indivisible_batch_is_a_one_line_error(tiny, tmp_path):
  done = run(
    f"--workdir={tmp_path / 'run'}",
    keys=[*tiny, "batch=12"],
    env={"XLA_FLAGS": "--xla_force_host_platform_device_count=8"},
  )
  assert_one_line_error(done, "batch is 12", "8 devices")
  assert not (tmp_path / "run").exists()


def test_unwritable_workdir_is_a_one_line_error(tiny, tmp_path):
  (tmp_path / "file").write_text("")
  done = run(f"--workdir={tmp_path / 'file' / 'run'}", keys=tiny)
  assert_one_line_error(done, str(tmp_path / "file"))


@pytest.fixture(scope="module")
def finished(digits_dir, tmp_path_factory):
  """Return the folder of a finished run with TensorBoard files."""
  workdir = tmp_path_factory.mktemp("finished") / "run"
  done = run_anew(
    f"--workdir={workdir}",
    keys=(*TINY, f"tfds_data_dir={digits_dir}"),
    env={"PYTHONPATH": str(paths.ROOT)},
  )
  assert done.returncode == 0, done.stderr
  assert list(workdir.glob("events.out.tfevents*"))
  return workdir


def test_finished_run_is_reported_and_unchanged(finished, tiny):
  before = snapshot(finished)
  done = run(f"--workdir={finished}", keys=tiny)
  assert done.returncode == 0 and "already finished" in done.stderr
  assert snapshot(finished) == before


def test_config_flag_is_optional_with_an_existing_workdir(finished):
  done = run(f"--workdir={finished}", config=None)
  assert done.returncode == 0 and "already finished" in done.stderr


def test_eval_mode_prints_and_writes_the_result(finished):
  done = run(f"--workdir={finished}", "--mode=eval", config=None)
  assert done.returncode == 0, done.stderr
  printed = json.loads(done.stdout)
  trained = json.loads((finished / "result.json").read_text())
  assert printed["accuracy"] == trained["best_accuracy"]
  written = json.loads((finished / "eval.json").read_text())
  assert len(written.pop("per_class")) == 10
  assert written == printed


def test_keys_override_the_config_of_an_existing_run(finished, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(finished, workdir)
  keys = ("eval_weights=latest",)
  done = run(f"--workdir={workdir}", "--mode=eval", config=None, keys=keys)
  assert json.loads(done.stdout)["step"] == 12
  keys = ("model.norm=LN",)
  done = run("--workdir", str(workdir), config=None, keys=keys)
  assert_one_line_error(done, "model.norm")


def test_none_is_a_valid_value(finished, digits_dir):
  keys = [*TINY, f"tfds_data_dir={digits_dir}", "pretrained_path=None"]
  done = run(f"--workdir={finished}", keys=keys)
  assert done.returncode == 0 and "already finished" in done.stderr
  args = [f"--workdir={finished}", "--config.pretrained_path", "None"]
  done = run(*args, keys=keys[:-1])
  assert done.returncode == 0 and "already finished" in done.stderr


def test_ctrl_c_at_the_start_is_one_line(tmp_path):
  """Python drops a KeyboardInterrupt that is raised in a weakref callback."""
  (tmp_path / "ml_collections.py").write_text(
    "import os, signal, weakref\n"
    "class Watched: pass\n"
    "watched = Watched()\n"
    "def interrupt(_): os.kill(os.getpid(), signal.SIGINT)\n"
    "reference = weakref.ref(watched, interrupt)\n"
    "del watched\n"
  )
  path = os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])
  done = run_anew(f"--workdir={tmp_path / 'run'}", env={"PYTHONPATH": path})
  assert done.returncode == 130
  assert_one_line_error(done, "interrupted")
  assert not (tmp_path / "run").exists()


def test_out_of_memory_is_a_one_line_error(tiny, tmp_path):
  done = run(f"--workdir={tmp_path}", keys=[*tiny, "model.hidden_size=4000000"])
  assert_one_line_error(done, "emory", "smaller batch")


def test_eval_mode_requires_a_checkpoint(tiny, tmp_path):
  done = run(f"--workdir={tmp_path}", "--mode=eval", keys=tiny)
  assert_one_line_error(done, "checkpoint")


def test_eval_mode_refuses_an_npz_with_another_head(tiny, finished, tmp_path):
  npz = tmp_path / "other.npz"
  export = ["rescalevit_jax.export", f"--workdir={finished}"]
  forked.run([*export, f"--output={npz}"], os.environ).check_returncode()
  with np.load(npz) as file:
    arrays = dict(file)
  arrays["head/kernel"] = np.zeros((16, 7), np.float32)
  arrays["head/bias"] = np.zeros(7, np.float32)
  np.savez(npz, **arrays)
  keys = [*tiny, f"pretrained_path={npz}", "eval_weights=pretrained"]
  done = run(f"--workdir={tmp_path}", "--mode=eval", keys=keys)
  assert_one_line_error(done, "head")


def test_changed_config_of_a_run_is_refused(finished, tiny):
  before = snapshot(finished)
  done = run(f"--workdir={finished}", keys=[*tiny, "model.norm=LN"])
  assert_one_line_error(done, "model.norm", "BN", "LN")
  assert snapshot(finished) == before


@pytest.mark.parametrize(
  "name, text",
  [
    ("config.json", '{"dataset": '),
    ("result.json", '{"best_accuracy": '),
    ("result.json", "{}"),
  ],
)
def test_damaged_json_is_a_one_line_error(finished, tiny, tmp_path, name, text):
  workdir = tmp_path / "run"
  shutil.copytree(finished, workdir)
  (workdir / name).write_text(text)
  assert_one_line_error(run(f"--workdir={workdir}", keys=tiny), name)


def damage(checkpoint):
  for path in checkpoint.rglob("*"):
    if path.is_file() and "ocdbt" in str(path):
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_checkpoints_are_skipped(finished, tiny, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(finished, workdir)
  (workdir / "result.json").unlink()
  last = workdir / "checkpoints" / "last"
  damage(last / "12")
  spare = shutil.copytree(workdir, tmp_path / "spare")
  done = run(f"--workdir={workdir}", keys=tiny)
  assert done.returncode == 0, done.stderr
  assert f"{last}/12" in done.stderr and "skipped" in done.stderr
  assert "resuming from step 8" in done.stderr
  metrics = (finished / "metrics.jsonl").read_bytes()
  assert (workdir / "metrics.jsonl").read_bytes() == metrics
  damage(spare / "checkpoints" / "last" / "8")
  before = snapshot(spare / "checkpoints")
  done = run(f"--workdir={spare}", keys=tiny)
  assert_one_line_error(done, "last/12", "last/8", "all checkpoints of this")
  assert snapshot(spare / "checkpoints") == before


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["Rescale", "LN", "BN", "GN", "Cal"])
def test_equal_seeds_give_bitwise_equal_runs(tiny, tmp_path, norm):
  found = []
  for name in ("a", "b"):
    keys = [*tiny, f"model.norm={norm}", "total_steps=6", "seed=3"]
    # Default optimizations, as for users.
    env = {"XLA_FLAGS": ""}
    done = run_anew(f"--workdir={tmp_path / name}", keys=keys, env=env)
    assert done.returncode == 0, done.stderr
    weights = checkpoint.load_variables(tmp_path / name, "latest")[:2]
    leaves = [x.tobytes() for x in jax.tree.leaves(jax.device_get(weights))]
    found.append(((tmp_path / name / "metrics.jsonl").read_bytes(), leaves))
  assert found[0] == found[1]


@pytest.mark.slow
def test_run_resumes_after_a_full_disk(finished, tiny, tmp_path):
  """A limit on file sizes causes the errors of a full disk."""
  workdir = tmp_path / "run"

  def limit():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

  done = run_anew(f"--workdir={workdir}", keys=tiny, preexec_fn=limit)
  assert_one_line_error(done)
  again = run(f"--workdir={workdir}", keys=tiny)
  assert again.returncode == 0, again.stderr
  assert (workdir / "metrics.jsonl").read_bytes() == (
    finished / "metrics.jsonl"
  ).read_bytes()


@pytest.mark.parametrize(
  "number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
)
def test_run_resumes_after_a_signal(finished, tiny, tmp_path, number):
  workdir = tmp_path / "run"
  process = subprocess.Popen(
    command(f"--workdir={workdir}", keys=tiny),
    cwd=paths.ROOT,
    stderr=subprocess.PIPE,
    text=True,
  )
  metrics = workdir / "metrics.jsonl"
  deadline = time.monotonic() + 200
  while not (metrics.exists() and metrics.stat().st_size):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  process.send_signal(number)
  _, stderr = process.communicate(timeout=200)
  if number == signal.SIGKILL:
    assert process.returncode == -signal.SIGKILL
  else:
    assert process.returncode == 0
    assert "stopped at step" in stderr or "finished" in stderr
    assert "Traceback" not in stderr
  done = run(f"--workdir={workdir}", keys=tiny)
  assert done.returncode == 0, done.stderr
  assert metrics.read_bytes() == (finished / "metrics.jsonl").read_bytes()
