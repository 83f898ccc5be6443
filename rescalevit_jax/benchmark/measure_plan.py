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
  """The planned measurements, most valuable first.

  Attributes:
    norms: config of the stage `norms`, and its items by name.
    reference: file of the float32 losses to compare with.
    speed: run and subject by name.
    speed_options: options of `run_worker.measure`.
    training: runs by name.
  """

  norms: tuple[ml_collections.ConfigDict, dict[str, dict[str, str]]]
  reference: pathlib.Path
  speed: dict[str, tuple[grid.PlannedRun, str]]
  speed_options: dict[str, float]
  training: dict[str, grid.PlannedRun]


def real(
  output: pathlib.Path, runs_dir: pathlib.Path, data_dir: str | None
) -> Plan:
  """Return the measurements on a GPU."""
  del output
  settings = [f"tfds_data_dir={data_dir}", "checkpoint_every=4000"]

  def plan(reference, *more):
    return _plan_run(reference, [*settings, *more], runs_dir)

  def original(model, norm, dataset="cifar10"):
    return plan(f"original.py:{model},{norm}", f"dataset={dataset}")

  strong = plan("cifar_strong.py")
  speed = []
  for model in ("ViT-B_32", "ViT-B_16"):
    speed += [
      (original(model, "Rescale"), "ours"),
      (original(model, "LN"), "ours"),
      (original(model, "LN"), "timm"),
    ]
  speed.append((strong, "ours"))
  for model in ("ViT-B_16", "ViT-B_32"):
    speed.append((original(model, "LN"), "flax"))
    speed += [(original(model, norm), "ours") for norm in ("BN", "GN")]
  for norm, subject in (("LN", "ours"), ("LN", "timm"), ("Rescale", "ours")):
    speed.append((original("ViT-L_16", norm), subject))
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
    *("batch=16", "batch_eval=120", "total_steps=40", "warmup_steps=3"),
    *("eval_every=20", "progress_every=5", "checkpoint_every=10"),
  ]

  def plan(reference, *more):
    return _plan_run(reference, [*settings, *more], runs_dir)

  runs = {
    norm: plan(f"original.py:ViT-XS_4,{norm}") for norm in ("Rescale", "LN")
  }
  strong = plan("cifar_strong.py", "model_name=ViT-XS_4")
  config = runs["LN"].config.copy_and_resolve_references()
  return _plan(
    config,
    list(runs),
    output / "reference.json",
    [(runs["LN"], subject) for subject in ("ours", "timm", "flax")],
    {"seconds": 0.3, "eval_images": 100},
    [*runs.values(), strong],
  )


def _plan_run(reference, settings, runs_dir):
  (run,) = grid.plan(
    [grid.repository_config(reference)],
    [],
    [overrides.parse_setting(text, "measure_gpu") for text in settings],
    runs_dir,
  )
  return run


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
    (config, {" ".join(item.values()): item for item in items}),
    reference,
    {f"{run.workdir.name} {subject}": (run, subject) for run, subject in speed},
    speed_options,
    {run.workdir.name: run for run in training},
  )
