"""The GPU measurements, rehearsed on a CPU."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types
import zipfile

import paths
import pytest
import rare_gc
import tiny_sweep

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.benchmark import measure_gpu
from rescalevit_jax.benchmark import measure_plan
from rescalevit_jax.benchmark import measure_report
from rescalevit_jax.benchmark import measure_results
from rescalevit_jax.benchmark import measure_session
from rescalevit_jax.benchmark import norm_steps
from rescalevit_jax.sweep import local_scheduler
from rescalevit_jax.sweep import outcome as outcome_lib

SCRIPT = paths.ROOT / "scripts" / "measure_gpu.sh"
# Hides optional packages and the network from Python processes.
BLOCK = """
import importlib.machinery, socket, sys
finder = importlib.machinery.PathFinder
find = finder.find_spec
def find_others(name, *args):
  if name in ("tensorflow", "tensorboard", "torch", "timm"):
    return None
  return find(name, *args)
finder.find_spec = find_others
def refuse(*args, **kwargs):
  open({log!r}, "a").write(repr((sys.argv, args)) + "\\n")
  raise OSError("no network")
socket.getaddrinfo = socket.create_connection = socket.socket.connect = refuse
"""


def start(*args, env):
  return subprocess.Popen(
    ["bash", str(SCRIPT), *args],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def run(*args, env=None):
  env = {**os.environ, "PYTHON": sys.executable, **(env or {})}
  process = start(*args, env=env)
  stdout, stderr = process.communicate(timeout=600)
  return subprocess.CompletedProcess(args, process.returncode, stdout, stderr)


def read(folder):
  return {
    path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")
  }


def done(results):
  """Return the names and results of finished measurements."""
  return {
    stage: {
      name: found
      for name, found in results.get(stage, {}).items()
      if "left_out" not in found and found.get("finished", True)
    }
    for stage in measure_results.STAGES
  }


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory, digits_dir, shared_dir):
  """Run a rehearsal in three calls: killed, stopped, resumed."""
  folder = tmp_path_factory.mktemp("rehearsal")
  hidden = folder / "hidden"
  hidden.mkdir()
  (hidden / "sitecustomize.py").write_text(
    rare_gc.CODE + BLOCK.format(log=str(folder / "network.txt"))
  )
  output = folder / "output"
  data = folder / "data"  # All processes have this path in their arguments.
  data.symlink_to(digits_dir)
  bound = {
    "gpu_title": "cpu of this machine",
    "subject": "ours",
    "norm": "LN",
    "model": "ViT-XS_4",
    "image_size": 32,
    "batch": 16,
    "dtype": "float32",
    "step_seconds": 1e-9,
  }
  (folder / "compiled.json").write_text(json.dumps({"rows": [bound]}))
  args = (
    "--rehearse",
    "--minutes=60",
    f"--output={output}",
    f"--data_dir={data}",
    f"--bounds={folder / 'compiled.json'}",
  )
  env = {
    **tiny_sweep.environment(shared_dir),
    "PYTHON": sys.executable,
    "PYTHONPATH": str(hidden),
  }
  # SIGTERM arrives during the first run.
  workdir = output / "runs" / "digits-ViT-XS_4-Rescale-scratch-seed0"
  stderr, snapshots = [], []
  for number, condition in (
    (signal.SIGKILL, (output / "speed.json").exists),
    (signal.SIGTERM, (workdir / "log.txt").exists),
  ):
    process = start(*args, env=env)
    tiny_sweep.wait_for(condition, process)
    process.send_signal(number)
    stderr.append(process.communicate(timeout=300)[1])
    assert process.returncode == (-number if number == signal.SIGKILL else 0)
    # Children of a killed parent die.
    deadline = time.monotonic() + 60
    while tiny_sweep.processes_of(folder):
      assert time.monotonic() < deadline
      time.sleep(0.1)
    snapshots.append(read(output))
  process = start(*args, env=env)
  stderr.append(process.communicate(timeout=600)[1])
  assert process.returncode == 0, stderr[-1]
  return types.SimpleNamespace(
    folder=folder,
    output=output,
    args=args,
    env=env,
    stderr=stderr,
    snapshots=snapshots,
    results=read(output),
  )


def test_resumed_rehearsal_keeps_finished_measurements(rehearsal):
  plan = measure_plan.rehearsal(rehearsal.output, rehearsal.output, "data")
  names = (plan.norms, plan.speed, plan.training)
  for stage, expected in zip(measure_results.STAGES, names, strict=True):
    assert set(rehearsal.results[stage]) == set(expected)
  assert done(rehearsal.snapshots[0])["norms"] == rehearsal.results["norms"]
  assert done(rehearsal.snapshots[0])["speed"]
  for before in map(done, rehearsal.snapshots):
    after = done(rehearsal.results)
    for stage in measure_results.STAGES:
      assert before[stage].items() <= after[stage].items()
  training = rehearsal.results["training"]
  for name, found in training.items():
    assert found["finished"] and found["step"] == 40
    assert found["evaluations"]["step"] == [20, 40]
    assert found["evaluations"]["accuracy"][-1] == found["last_accuracy"]
    log = rehearsal.output / "runs" / name / "log.txt"
    assert log.read_text().count("finished: ") == 1
  assert "runs save and stop" in rehearsal.stderr[1]
  assert len(done(rehearsal.snapshots[1])["training"]) <= 1


def test_rehearsal_needs_no_network_or_optional_packages(rehearsal):
  assert not (rehearsal.folder / "network.txt").exists()
  speed = rehearsal.results["speed"]
  left_out = {x["left_out"] for x in speed.values() if "left_out" in x}
  assert left_out == {"timm is not installed"}


def test_summary_of_a_rehearsal(rehearsal):
  text = (rehearsal.output / "summary.md").read_text()
  norms, speed = rehearsal.results["norms"], rehearsal.results["speed"]
  check = norms["check LN bfloat16 auto"]
  assert check["within"] and 0 < check["loss_difference"] < 0.01
  assert norms["check LN float32 auto"]["loss_difference"] < 1e-5
  assert f"{100 * check['loss_difference']:.3f} %" in text
  ours = speed["digits-ViT-XS_4-LN-scratch-seed0 ours"]
  flax = speed["digits-ViT-XS_4-LN-scratch-seed0 flax"]
  ratio = ours["images_per_second"] / flax["images_per_second"]
  assert f"| {ratio:.2f} |" in text
  assert f"| {ours['step_seconds'] / 1e-9:.2f} |" in text
  (run,) = [x for n, x in rehearsal.results["training"].items() if "Cal" in n]
  assert f"| {100 * run['last_accuracy']:.2f} |" in text
  assert "timm is not installed" in text
  assert str(rehearsal.folder) not in text


def test_a_finished_rehearsal_measures_nothing(rehearsal):
  process = start(*rehearsal.args, env=rehearsal.env)
  _, stderr = process.communicate(timeout=300)
  assert process.returncode == 0
  assert read(rehearsal.output) == rehearsal.results
  assert "training: 0 of 3 left" in stderr


def test_a_wrong_loss_is_reported(rehearsal, tmp_path):
  reference = rehearsal.results["reference"]
  reference = json.loads(json.dumps(reference))
  reference["norms"]["LN"]["eval_loss"] *= 1.02
  (tmp_path / "reference.json").write_text(json.dumps(reference))
  (tmp_path / "machine.json").write_text(
    json.dumps(rehearsal.results["machine"])
  )
  plan = measure_plan.rehearsal(tmp_path, tmp_path, None)
  session = measure_session.Session(plan, tmp_path, 100.0, None)
  name = "check LN bfloat16 auto"
  found = dict(rehearsal.results["norms"][name])

  def record(config, items, seconds, most_seconds, record):
    record(name, found)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(norm_steps, "run", record)
    assert session.run(["norms"], needs_gpu=False) == 1
  assert read(tmp_path)["norms"][name]["within"] is False
  assert "% (too large) |" in (tmp_path / "summary.md").read_text()


@pytest.fixture
def session(tmp_path, monkeypatch):
  plan = measure_plan.rehearsal(tmp_path, tmp_path / "runs", None)
  reference = {"model_name": "ViT-XS_4", "image_size": 32, "norms": {}}
  reference["images"] = norm_steps.IMAGES
  machine = {"devices": "1 x cpu", "cores": 1, "processor": "", "versions": {}}
  (tmp_path / "reference.json").write_text(json.dumps(reference))
  (tmp_path / "machine.json").write_text(json.dumps(machine))
  monkeypatch.setattr(measure_session.machine_lib, "describe", lambda: machine)
  # A step takes 1 s, a run 40 s plus startup.
  speed = {
    "step_seconds": 1.0,
    "eval_images_per_second": 1e9,
    "compile_seconds": 0.0,
    "images_per_second": 1.0,
    "step_seconds_low": 1.0,
    "step_seconds_high": 1.0,
    "peak_flops_per_second": 1.0,
    "dtype": "float32",
  }
  name = "digits-ViT-XS_4-LN-scratch-seed0 ours"
  (tmp_path / "speed.json").write_text(json.dumps({name: speed}))
  return lambda seconds: measure_session.Session(plan, tmp_path, seconds, None)


def start_runs(session, seconds, monkeypatch):
  """Return the names of the runs that a session starts."""
  started = []

  class FakeScheduler:
    def __init__(self, runs, done, slots, stop_times):
      (self.run_,) = runs
      assert time.monotonic() < stop_times[0] < time.monotonic() + seconds

    def run(self):
      started.append(self.run_.workdir.name)
      return outcome_lib.Outcome(done=[self.run_])

  monkeypatch.setattr(local_scheduler, "LocalScheduler", FakeScheduler)
  monkeypatch.setattr(measure_session.Session, "_data_problem", lambda *_: None)
  session(seconds).run(["training"], needs_gpu=False)
  return started


def test_runs_that_finish_in_time_come_first(session, tmp_path, monkeypatch):
  rescale, ln, cal = (
    f"digits-ViT-XS_4-{norm}-scratch-seed0" for norm in ("Rescale", "LN", "Cal")
  )
  assert start_runs(session, 1000, monkeypatch) == [rescale, ln, cal]
  # 40 steps of 1 s do not fit; the speed of the last run is unknown.
  assert start_runs(session, 90, monkeypatch) == [rescale, ln, cal]
  assert start_runs(session, 50, monkeypatch) == []
  (tmp_path / "runs" / ln / "checkpoints" / "last" / "39").mkdir(parents=True)
  assert start_runs(session, 90, monkeypatch) == [ln, rescale, cal]


def test_stages_divide_the_time_limit(session, monkeypatch):
  limits = {}

  def record(config, items, seconds, most_seconds, record):
    limits["norms"] = seconds, most_seconds

  monkeypatch.setattr(norm_steps, "run", record)
  for stage in ("_measure_speed", "_train"):
    monkeypatch.setattr(
      measure_session.Session,
      stage,
      lambda self, names, stop, stage=stage: limits.update(
        {stage: stop - time.monotonic()}
      ),
    )
  session(1000).run(list(measure_results.STAGES), needs_gpu=False)
  assert limits["norms"] == (pytest.approx(350, 0.1), pytest.approx(380, 0.1))
  assert limits["_measure_speed"] == pytest.approx(500, 0.1)
  assert limits["_train"] == pytest.approx(1000, 0.1)


def test_failed_items_are_retried_last(session, tmp_path, monkeypatch):
  plan = measure_plan.rehearsal(tmp_path, tmp_path, None)
  first, second, *_ = plan.norms
  failed = {first: {"error": "it broke"}, second: {"loss": 1.0}}
  (tmp_path / "norms.json").write_text(json.dumps(failed))
  asked = []

  def record(config, items, *_):
    asked.extend(items)

  monkeypatch.setattr(norm_steps, "run", record)
  assert session(1000).run(["norms"], needs_gpu=False) == 1
  assert asked == [*list(plan.norms)[2:], first]
  assert f"- {first}: it broke" in (tmp_path / "summary.md").read_text()


def test_continuing_on_another_machine_is_an_error(session, tmp_path):
  machine = json.loads((tmp_path / "machine.json").read_text())
  machine["devices"] = "1 x NVIDIA H100"
  (tmp_path / "machine.json").write_text(json.dumps(machine))
  with pytest.raises(errors.UserError, match="of 1 x NVIDIA H100 with"):
    session(1000).run([], needs_gpu=False)


def test_the_item_that_crashes_the_process_is_identified(monkeypatch, tmp_path):
  """Other items compile at the same time."""
  (tmp_path / "child.py").write_text(
    "import json, os, sys\n"
    "items, threads = json.loads(sys.argv[2]), int(sys.argv[4])\n"
    "for first in range(0, len(items), threads):\n"
    "  group = items[first : first + threads]\n"
    "  if 'BAD' in group:\n"
    "    os._exit(1)\n"
    "  for item in group:\n"
    "    print(json.dumps({'loss': 1.0}), flush=True)\n"
  )
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))
  monkeypatch.setattr(norm_steps, "__name__", "child")
  monkeypatch.setattr(norm_steps, "_THREADS", 4)
  items = {name: name for name in ("LN", "BN", "BAD", "GN")}
  found = {}
  config = config_lib.default()
  norm_steps.run(config, items, 60.0, 60.0, found.__setitem__)
  assert [x for x in found if "error" in found[x]] == ["BAD"]
  assert found.keys() == items.keys()


def test_bounds_for_several_gpus_are_refused(tmp_path):
  path = tmp_path / "compiled.json"
  path.write_text(json.dumps({"devices": 8, "rows": []}))
  with pytest.raises(errors.UserError, match="is of 8 GPUs"):
    measure_results.read_bounds(path)


@pytest.mark.parametrize("text", ["3", "[]", '{"rows": 3}', '{"rows": [3]}'])
def test_bounds_are_rows(tmp_path, text):
  path = tmp_path / "compiled.json"
  path.write_text(text)
  with pytest.raises(errors.UserError, match=r"compiled\.json has no rows; "):
    measure_results.read_bounds(path)


@pytest.mark.parametrize("name", ["machine", "norms", "reference"])
def test_results_other_than_a_json_object_are_refused(session, tmp_path, name):
  (tmp_path / f"{name}.json").write_text("3")
  with pytest.raises(errors.UserError, match=rf"{name}\.json: damaged .*; del"):
    session(1000)


def check_of(norm, attention):
  """Return an item in float32."""
  return dict(kind="check", norm=norm, dtype="float32", attention=attention)


def test_an_item_that_fails_does_not_stop_the_next(monkeypatch):
  items = {norm: check_of(norm, "cudnn") for norm in ("LN", "BN")}
  config, found = config_lib.default(), {}
  norm_steps.run(config, items, 600.0, 600.0, found.__setitem__)
  assert list(found) == ["LN", "BN"]
  assert all("cudnn" in x["error"].lower() for x in found.values())
  monkeypatch.setenv("XLA_FLAGS", "--no_such_flag")  # Aborts the process.
  norm_steps.run(config, items, 600.0, 600.0, found.__setitem__)
  assert all("process ended" in x["error"] for x in found.values())


def test_a_hanging_item_is_killed():
  items, found = {"a": check_of("LN", "auto")}, {}
  norm_steps.run(config_lib.default(), items, 9.0, 0.5, found.__setitem__)
  assert found == {"a": {"error": norm_steps.OUT_OF_TIME}}


def test_losses_are_compared_with_the_reference():
  reference = {
    "loss": 2.0,
    "second_loss": 1.0,
    "eval_loss": 4.0,
    "grad_norm": 10.0,
  }
  for key, factor, within in (
    ("second_loss", 1.009, True),
    ("second_loss", 1.011, False),
    ("eval_loss", 0.989, False),
    ("grad_norm", 1.009, True),
    ("grad_norm", 0.989, False),
    ("loss", float("nan"), False),
    ("eval_loss", float("nan"), False),
  ):
    found = {**reference, key: factor * reference[key]}
    result = measure_report.compare(found, reference, "bfloat16")
    assert result["within"] is within, (key, factor)


def test_a_run_without_published_last_accuracy_has_a_row(tmp_path):
  plan = measure_plan.real(tmp_path, tmp_path, None)
  (name,) = [x for x in plan.training if x.startswith("cifar10-ViT-B_16-LN")]
  found = {"step": 100, "finished": False}
  found["evaluations"] = {"accuracy": [0.25], "step": [100], "loss": [1.0]}
  text = measure_report._training(plan.training, {name: found})
  assert f"| {name} | 100 of 20000 | 25.00 | 25.00 |  |" in text


def test_reference_losses_match_the_measured_config(tmp_path):
  plan = measure_plan.real(tmp_path, tmp_path, None)
  reference = json.loads(plan.reference.read_text())
  assert reference["model_name"] == plan.config.model_name == "ViT-B_16"
  assert reference["image_size"] == plan.config.image_size == 224
  assert reference["images"] == norm_steps.IMAGES
  for found in reference["norms"].values():
    assert all(value > 0 for value in found.values())


@pytest.mark.slow
def test_reference_losses_equal_the_models(tmp_path):
  plan = measure_plan.real(tmp_path, tmp_path, None)
  reference = json.loads(plan.reference.read_text())["norms"]["LN"]
  item = {**plan.norms["check LN float32 auto"]}
  found = norm_steps.prepare_check(norm_steps.item_config(plan.config, item))()
  assert found == pytest.approx(reference, rel=1e-3)


def test_a_run_stops_at_its_deadline(digits_dir, shared_dir, tmp_path):
  code = f"""
import pathlib, time
from rescalevit_jax.config import overrides
from rescalevit_jax.sweep import grid
from rescalevit_jax.sweep import subprocess_run
from rescalevit_jax.sweep import local_scheduler
settings = {[*tiny_sweep.KEYS, f"tfds_data_dir={digits_dir}"]!r}
settings[settings.index("total_steps=40")] = "total_steps=1000000"
(run,) = grid.plan(
  ["configs/quickstart.py"],
  [],
  [overrides.parse_setting(text, "") for text in settings],
  pathlib.Path({str(tmp_path)!r}),
)
class Clock:
  def __lt__(self, now):  # Passes once the run has made some steps.
    return subprocess_run.step_since(run.workdir, 0) > 20
outcome = local_scheduler.LocalScheduler([run], [], [{{}}], [Clock()]).run()
assert outcome.stopped and outcome.left == [run] and not outcome.failed
assert subprocess_run.saved_step(run.workdir) > 20
"""
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=paths.ROOT,
    env=tiny_sweep.environment(shared_dir),
    capture_output=True,
    text=True,
    check=False,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
  "flags, words",
  [
    (["--stages=nrms"], "did you mean norms?"),
    (["--minutes=0"], "--minutes"),
    (["--minutes=inf"], "--minutes"),
    (["--rehearse", "--bounds=BOUNDS"], "compiled.json"),
    ([], "JAX sees no GPU"),
  ],
)
def test_errors_are_one_line(flags, words, session, tmp_path, capsys):
  del session  # It has written a reference and machine.json.
  if not flags:
    (tmp_path / "machine.json").unlink()
  (tmp_path / "bounds.json").write_text("[]")
  flags = [x.replace("BOUNDS", str(tmp_path / "bounds.json")) for x in flags]
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_PLATFORMS", "cpu")
    patch.setenv("CUDA_VISIBLE_DEVICES", "0")
    patch.setattr(signal, "signal", lambda *_: None)
    assert measure_gpu.main([f"--output={tmp_path}", *flags]) == 1
  line = capsys.readouterr().err.splitlines()[-1]
  assert line.startswith("error: ") and words in line


def test_script_prints_help_and_installs_wheels(tmp_path):
  wheels = tmp_path / "wheels"
  wheels.mkdir()
  with zipfile.ZipFile(wheels / "tiny-1.0-py3-none-any.whl", "w") as wheel:
    wheel.writestr("tiny.py", "")
    for name, text in (
      ("METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n"),
      ("WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"),
      ("RECORD", ""),
    ):
      wheel.writestr(f"tiny-1.0.dist-info/{name}", text)
  env = {"XDG_CACHE_HOME": str(tmp_path)}
  helped = run("--help", f"--wheels={wheels}", env=env)
  assert helped.returncode == 0, helped.stderr
  for word in ("--minutes", "--wheels", "--rehearse", "norms", "training"):
    assert word in helped.stdout
  assert (tmp_path / "rescalevit_jax" / "wheels" / "tiny.py").exists()
  assert "pip" not in run("--help", env=env).stderr
  lines = pathlib.Path(SCRIPT).read_text().splitlines()
  assert len(lines) <= 40


def test_norms_are_measured_on_one_gpu_without_a_cache(monkeypatch):
  """As the speed of the recipe is."""
  found = {}

  def start(command, env, **kwargs):
    found.update(env)
    raise OSError("not started")

  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "cache")
  monkeypatch.setattr(norm_steps.subprocess, "Popen", start)
  with pytest.raises(OSError, match="not started"):
    norm_steps.run(config_lib.default(), {"x": {}}, 1, 1, lambda *args: None)
  assert found["CUDA_VISIBLE_DEVICES"] == "2"
  assert "JAX_COMPILATION_CACHE_DIR" not in found
