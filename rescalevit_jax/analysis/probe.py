r"""Measure freshly initialized models side by side, before any training.

python -m rescalevit_jax.analysis.probe --config=configs/norm_free.py
python -m rescalevit_jax.analysis.probe --config=configs/norm_free.py:LN \
    --config=configs/norm_free.py:Cal-rescalenet --config.seed=1
python -m rescalevit_jax.analysis.probe --config=configs/cifar_small.py \
    --grid model.norm=LN,Identity --grid model.init=torch,unit

A config without :ARGS expands to all METHODS of its file if it defines any,
else to every norm. With a grid it expands to the points of the grid. Norms with
a calibration are calibrated.

The measurements equal those at step 1 of a run with --config.diagnostics_every.
The gradient is of the first training batch. All other measurements are of the
first images of the evaluation split. The Jacobian is measured here only. There
is one difference: before the measurements, norms with running statistics gather
them from training batches, unless a file provides them.

Prints a table; writes probe.csv, a row for each part of each model, probe.png
and probe.svg.
"""

from collections.abc import Sequence
import dataclasses
import functools
import itertools
import logging
import math
import pathlib
import sys

from flax import traverse_util
import jax
import ml_collections
import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.analysis import plots
from rescalevit_jax.analysis import probe_plots
from rescalevit_jax.config import overrides
from rescalevit_jax.models import norms
from rescalevit_jax.models.norms import traits
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import markdown
from rescalevit_jax.runtime import terminal
from rescalevit_jax.training import diagnostics
from rescalevit_jax.training import experiment as experiment_lib
from rescalevit_jax.training import initial_state
from rescalevit_jax.training import measurements
from rescalevit_jax.training import train_state

_log = logging.getLogger("rescalevit_jax.analysis.probe")
# Running statistics that are zero before the first batch.
_MEANS = ("mean", "init_mean")


def main(argv: Sequence[str] | None = None) -> int:
  """Measure models; return the exit code."""
  terminal.log_to_stderr()
  return cli.run(lambda: _run(argv))


def _run(argv):
  parser = cli.parser(__doc__, allow_abbrev=False)
  parser.add_argument(
    "--config",
    action="append",
    required=True,
    metavar="FILE[:ARGS]",
    help="a config; repeatable. --config.KEY=VALUE sets a key for all configs",
  )
  parser.add_argument(
    "--grid",
    action="append",
    default=[],
    metavar="KEY=VALUE,VALUE",
    help="values of a config key; repeatable, for every combination",
  )
  parser.add_argument(
    "--no_sharpness",
    action="store_true",
    help="omit the sharpness, which takes the most time",
  )
  parser.add_argument(
    "--output",
    type=pathlib.Path,
    default=pathlib.Path("probe"),
    help="output folder (default: probe)",
  )
  rest, settings = overrides.split_argv(cli.arguments(argv))
  args = parser.parse_args(rest)
  points = list(itertools.product(*map(overrides.parse_axis, args.grid)))
  configs = load_configs(args.config, settings, points)
  args.output.mkdir(parents=True, exist_ok=True)
  found = []
  for i, (label, config) in enumerate(configs.items(), start=1):
    _log.info("%s: model %d of %d", label, i, len(configs))
    found.append((label, config, measure(config, not args.no_sharpness)))
  rows = list(map(_summary, found))
  alignment = "ll" + "r" * (len(rows[0]) - 2)
  print(markdown.table(alignment, rows[0], map(dict.values, rows)), end="")
  clips = {config.grad_norm_clip for config in configs.values()}
  draw = functools.partial(
    probe_plots.compare,
    [(label, config.model.norm, x) for label, config, x in found],
    clips.pop() if len(clips) == 1 else 0,
  )
  plots.save_with_table(draw, _table(found), args.output / "probe")


def load_configs(
  references: Sequence[str],
  settings: Sequence[overrides.Setting],
  points: Sequence[tuple[overrides.Setting, ...]],
) -> dict[str, ml_collections.ConfigDict]:
  """Return the configs of FILE[:ARGS] to compare, by label.

  Args:
    references: config files.
    settings: overrides for all configs.
    points: points of a grid, each a tuple of overrides. With [()], a config
      without ARGS expands to all METHODS of its file, or to every norm, unless
      the settings contain the norm.
  """
  configs = {}
  files = {reference.partition(":")[0] for reference in references}
  stems = {pathlib.Path(file).stem for file in files}
  for reference in references:
    for label, file, point in _variants(reference, settings, points):
      if len(files) > 1:
        path = file.partition(":")[0]
        ambiguous = len(stems) < len(files)
        label = f"{path if ambiguous else pathlib.Path(path).stem}: {label}"
      if label in configs:
        raise errors.UserError(f"{label} is given twice; give each model once")
      configs[label] = overrides.load_config(file, [*settings, *point])
  return configs


def _variants(reference, settings, points):
  """Yield label, config file with ARGS, and settings of each model."""
  path, _, method = reference.partition(":")
  if points != [()]:
    for point in points:
      values = [setting.text for setting in point]
      yield ", ".join([*filter(None, [method]), *values]), reference, point
    return
  if method:
    yield method, reference, ()
    return
  overrides.load_config(reference, ())  # To report its errors.
  if given := [x.text for x in settings if x.key == "model.norm"]:
    yield given[-1], reference, ()
    return
  if methods := overrides.methods(path):
    for method in methods:
      yield method, f"{path}:{method}", ()
    return
  for norm in norms.NORMS:
    yield norm, reference, (overrides.Setting("model.norm", norm),)


def measure(
  config: ml_collections.ConfigDict, sharpness: bool = True
) -> dict[str, float]:
  """Return measurements of a model before its first training step.

  These are the measurements of `measurements.by_name`, `grad_norm` of all
  parameters before clipping, `clip_factor`, and `grad_share_qk`, the share of
  queries and keys in the squared `grad_norm`.
  """
  experiment = experiment_lib.create(config)
  state = initial_state.create(experiment)
  programs = diagnostics.CompiledDiagnostics(experiment)
  loader = experiment.train_loader
  with loader.batches(experiment.train_indices, range(1, 2)) as batches:
    batch = next(batches)
  found, _ = programs.before_step(state, *batch)
  without, state = state, with_statistics(experiment, state)
  if state is not without:
    seen, _ = programs.before_step(state, *batch)
    found |= {k: x for k, x in seen.items() if not k.startswith("grad_norm")}
  if sharpness:
    found |= programs.sharpness(state)
  found |= programs.jacobian(state)
  found = jax.device_get(found)
  norm = float(np.linalg.norm(found["grad_norm"]))
  qk = float(np.square(found["grad_norm_qk"]).sum())
  return {
    "grad_norm": norm,
    "clip_factor": diagnostics.clip_factor(norm, config.grad_norm_clip),
    "grad_share_qk": qk / norm**2 if norm else math.nan,
    **measurements.by_name(found, experiment.model.config.num_layers),
  }


def with_statistics(
  experiment: experiment_lib.Experiment, state: train_state.TrainState
) -> train_state.TrainState:
  """Return an initial state with running statistics of training batches.

  It is unchanged if the norm has no running statistics or a file provides all
  of them. Schedules do not start.
  """
  config = experiment.model.config
  Norm = norms.NORMS[config.norm]
  stats = traverse_util.flatten_dict(state.batch_stats)
  means = [x for (*_, name), x in stats.items() if name in _MEANS]
  if not issubclass(Norm, traits.RunningStatistics) or all(map(np.any, means)):
    return state
  fixed = dataclasses.replace(config, norm_schedule=None)
  model = experiment.model.clone(config=fixed)
  experiment = dataclasses.replace(experiment, model=model)
  batches = Norm.num_stats_batches(config.norm_options("final"))
  return experiment.calibrate(state, batches)


def _summary(model):
  """Return a row of the displayed table."""
  label, config, numbers = model
  blocks = sum(name.endswith("/attention_entropy") for name in numbers)
  last = measurements.block_name(blocks - 1)

  def of_blocks(quantity):
    names = map(measurements.block_name, range(blocks))
    found = [numbers.get(f"{name}/{quantity}") for name in names]
    return [x for x in found if x is not None]

  def mean(values):
    return _number(np.mean(values) if values else None)

  def first_and_last(tokens):
    name = f"stream_rms_{tokens}"
    ends = (numbers.get(f"{part}/{name}") for part in ("embedding", last))
    return " → ".join(map(_number, ends))

  gradients = of_blocks("grad_norm")
  saturated = of_blocks("saturation_attention") + of_blocks("saturation_mlp")
  return {
    "model": label,
    "norm": config.model.norm,
    "residual stream RMS, class token": first_and_last("cls"),
    "residual stream RMS, patches": first_and_last("patches"),
    "gradient norm": _number(numbers["grad_norm"]),
    "clip factor": _number(numbers["clip_factor"]),
    "gradient norm, first / last block": _number(
      gradients[0] / gradients[-1] if gradients and gradients[-1] else None
    ),
    "Jacobian norm, all blocks": _number(numbers.get("embedding/jacobian")),
    "gradient share of queries and keys": _number(numbers["grad_share_qk"]),
    "attention entropy, nats": mean(of_blocks("attention_entropy")),
    "saturated outputs": mean(saturated),
    "sharpness": _number(numbers.get("sharpness")),
  }


def _number(x):
  return markdown.NOTHING if x is None or not math.isfinite(x) else f"{x:.3g}"


def _table(found):
  """Return a header, and rows: each part of each model, and the whole."""
  rows = []
  for label, config, numbers in found:
    parts = {}
    for name, value in numbers.items():
      part, _, quantity = name.rpartition("/")
      parts.setdefault(part or "all", {})[quantity] = value
    start = {"model": label, "norm": config.model.norm, "seed": config.seed}
    rows += [start | {"part": part} | x for part, x in sorted(parts.items())]
  columns = list(dict.fromkeys(key for row in rows for key in row))
  return [columns, *([row.get(key) for key in columns] for row in rows)]


if __name__ == "__main__":
  sys.exit(main())
