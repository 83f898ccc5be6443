"""Plan the measurements of `measure_gpu`, on a GPU and in a rehearsal."""

import dataclasses
import pathlib

import ml_collections

from rescalevit_jax import config as config_lib
from rescalevit_jax.config import overrides
from rescalevit_jax.models import norms
from rescalevit_jax.sweep import grid

_REFERENCE = pathlib.Path(__file__).parent / "reference.json"


@dataclasses.dataclass(frozen=True)
class Plan:
  """The planned measurements by name, most valuable first."""

  config: ml_collections.ConfigDict  # Of the stage `norms`.
  reference: pathlib.Path  # Float32 losses to compare with.
  norms: dict[str, dict[str, str]]  # Items of `norm_steps.run`.
  speed: dict[str, tuple[grid.PlannedRun, str]]  # Run and subject.
  speed_options: dict[str, float]  # Of `run_worker.measure`.
  training: dict[str, grid.PlannedRun]


def real(
  output: pathlib.Path, runs_dir: pathlib.Path, data_dir: str | None
) -> Plan:
  """Return the measurements on a GPU."""
  del output
  plan = _planner(
    [f"tfds_data_dir={data_dir}", "checkpoint_every=4000"], runs_dir
  )

  def original(model, norm, dataset="cifar10"):
    return plan(f"original.py:{model},{norm}", f"dataset={dataset}")

  def programs(model, *pairs):
    return [(original(model, norm), subject) for norm, subject in pairs]

  strong = plan("cifar_strong.py")
  first = ("Rescale", "ours"), ("LN", "ours"), ("LN", "timm")
  second = ("LN", "flax"), ("BN", "ours"), ("GN", "ours")
  speed = [
    *programs("ViT-B_32", *first),
    *programs("ViT-B_16", *first),
    (strong, "ours"),
    *programs("ViT-B_16", *second),
    *programs("ViT-B_32", *second),
    *programs("ViT-L_16", ("LN", "ours"), ("LN", "timm"), ("Rescale", "ours")),
  ]
  training = [
    original(model, norm, dataset)
    for model in ("ViT-B_32", "ViT-B_16")
    for dataset in ("cifar10", "cifar100")
    for norm in ("Rescale", "LN", "BN", "GN")
  ]
  config = config_lib.default()
  config.model_name = "ViT-B_16"
  return _plan(
    config,
    list(norms.NORMS),
    _REFERENCE,
    speed,
    {"seconds": 6.0, "eval_images": 10_000},
    [*training, strong],
  )


def rehearsal(
  output: pathlib.Path, runs_dir: pathlib.Path, data_dir: str | None
) -> Plan:
  """Return small versions of the measurements, for a CPU."""
  settings = [
    f"tfds_data_dir={data_dir or output / 'data'}",
    *("dataset=digits", "image_size=32", "model.num_layers=1"),
    *("augment.crop=False", "model.dropout_rate=0.0"),
    *("batch=16", "batch_eval=120", "total_steps=40", "warmup_steps=3"),
    *("eval_every=20", "progress_every=5", "checkpoint_every=10"),
  ]
  plan = _planner(settings, runs_dir)
  rescale, ln = (
    plan(f"original.py:ViT-XS_4,{norm}") for norm in ("Rescale", "LN")
  )
  return _plan(
    ln.config,
    ["LN"],
    output / "reference.json",
    [(ln, subject) for subject in ("ours", "timm", "flax")],
    {"seconds": 0.3, "eval_images": 100},
    [rescale, ln, plan("cifar_strong.py", "model_name=ViT-XS_4")],
  )


def _planner(settings, runs_dir):
  """Return a function from a config and more settings to a run."""

  def plan(reference, *more):
    (run,) = grid.plan(
      [grid.repository_config(reference)],
      [],
      [overrides.parse_setting(x, "measure_gpu") for x in (*settings, *more)],
      runs_dir,
    )
    return run

  return plan


def _plan(config, names, reference, speed, speed_options, training):
  items = [
    {"kind": kind, "norm": norm, "dtype": dtype, "attention": attention}
    for kind, dtype, attention in (
      ("check", "bfloat16", "auto"),
      ("time", "bfloat16", "auto"),
      ("check", "float32", "auto"),
      ("time", "bfloat16", "xla"),
    )
    for norm in names
  ]
  return Plan(
    config,
    reference,
    {" ".join(item.values()): item for item in items},
    {f"{run.workdir.name} {subject}": (run, subject) for run, subject in speed},
    speed_options,
    {run.workdir.name: run for run in training},
  )
