r"""Measures freshly initialised models side by side, before any training.

python -m rescalevit_jax.analysis.probe --config=configs/norm_free.py
python -m rescalevit_jax.analysis.probe --config=configs/norm_free.py:LN \
    --config=configs/norm_free.py:Cal-rescalenet --config.seed=1
python -m rescalevit_jax.analysis.probe --config=configs/cifar_small.py \
    --grid model.norm=LN,Identity --grid model.init=torch,unit

A config without :ARGS stands for all METHODS of its file if it has some, else
for every norm; with a grid, for the grid's points. Norms that are calibrated
are. The numbers are those that a run with --config.diagnostics_every writes at
step 1: the gradient is that of the first training batch, the rest is seen on
the first images of the evaluation split. But for that rest, norms that gather
statistics in training (BN, BN2, Rescale) have those of the first 48 training
batches (Rescale: 8), unless a file brings them: as a run from scratch begins,
they would do nothing in evaluation mode. Prints a table; writes probe.csv, a
row for each part of each model, probe.png and probe.svg.
"""

import argparse
from collections.abc import Sequence
import csv
import io
import itertools
import logging
import math
import pathlib
import sys

import jax
import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.analysis import plots
from rescalevit_jax.analysis import probe_plots
from rescalevit_jax.config import overrides
from rescalevit_jax.models import norms
from rescalevit_jax.runtime import atomic_file
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import markdown as markdown_lib
from rescalevit_jax.runtime import terminal
from rescalevit_jax.training import diagnostics
from rescalevit_jax.training import experiment as experiment_lib
from rescalevit_jax.training import measurements

_log = logging.getLogger("rescalevit_jax.probe")
_SETTING = "--config."


def main(argv: Sequence[str] | None = None) -> int:
  """Measures; returns the exit code."""
  argv = list(sys.argv[1:] if argv is None else argv)
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument(
    "--config",
    action="append",
    required=True,
    metavar="FILE[:ARGS]",
    help="a config; repeatable. --config.KEY=VALUE sets a key for all",
  )
  parser.add_argument(
    "--grid",
    action="append",
    default=[],
    metavar="KEY=VALUE,VALUE",
    help="values of a key, each with each of other grids; repeatable",
  )
  parser.add_argument(
    "--no_sharpness",
    action="store_true",
    help="leave out the sharpness, which takes longest",
  )
  parser.add_argument(
    "--output",
    type=pathlib.Path,
    default=pathlib.Path("probe"),
    help="folder for the table and the picture; default: probe",
  )
  settings = [x for x in argv if x.startswith(_SETTING)]
  args = parser.parse_args([x for x in argv if not x.startswith(_SETTING)])
  terminal.log_to_stderr()
  return cli.run(lambda: _run(args, settings))


def _run(args, settings):
  settings = [
    overrides.parse_setting(text.removeprefix(_SETTING), _SETTING + "KEY")
    for text in settings
  ]
  points = list(itertools.product(*map(overrides.parse_axis, args.grid)))
  configs = {}
  files = {reference.partition(":")[0] for reference in args.config}
  stems = {pathlib.Path(file).stem for file in files}
  for reference in args.config:
    for label, file, point in _variants(reference, points):
      if len(files) > 1:
        path = file.partition(":")[0]
        same = len(stems) < len(files)
        label = f"{path if same else pathlib.Path(path).stem}: {label}"
      if label in configs:
        raise errors.UserError(f"{label} is given twice; give each model once")
      configs[label] = overrides.load_config(file, [*settings, *point])
  args.output.mkdir(parents=True, exist_ok=True)
  found = []
  for i, (label, config) in enumerate(configs.items(), start=1):
    _log.info("%s: model %d of %d", label, i, len(configs))
    found.append((label, config, measure(config, not args.no_sharpness)))
  rows = list(map(_summary, found))
  print(_markdown(rows))
  atomic_file.write(args.output / "probe.csv", _csv(found))
  clips = {config.grad_norm_clip for _, config, _ in found}
  figure = probe_plots.compare(
    [(label, config.model.norm, x) for label, config, x in found],
    clips.pop() if len(clips) == 1 else 0,
  )
  for kind in ("png", "svg"):
    plots.save(figure, args.output / f"probe.{kind}")
  for kind in ("csv", "png", "svg"):
    print(args.output / f"probe.{kind}")


def _variants(reference, points):
  """Yields label, config file with its ARGS, and settings of each model."""
  path, _, method = reference.partition(":")
  if points != [()]:
    for point in points:
      values = [setting.text for setting in point]
      yield ", ".join([*filter(None, [method]), *values]), reference, point
    return
  if method:
    yield method, reference, ()
    return
  overrides.load_config(reference, ())  # Its mistakes, in one line.
  if methods := overrides.methods(path):
    for method in methods:
      yield method, f"{path}:{method}", ()
    return
  for norm in norms.NORMS:
    yield norm, reference, (overrides.Setting("model.norm", norm),)


def measure(config, sharpness: bool = True) -> dict[str, float]:
  """Measures the model that a config describes at the start of its run.

  Args:
    config: of the run.
    sharpness: whether to measure that, too.

  Returns:
    The numbers of `measurements.by_name`, `grad_norm` of all parameters before
    clipping, `clip_factor`, and `grad_share_qk`, the share that queries and
    keys have in the square of `grad_norm`.
  """
  experiment = experiment_lib.create(config)
  state = experiment_lib.initial_state(experiment)
  programs = diagnostics.CompiledDiagnostics(experiment)
  first = range(1, 2)
  with experiment.train_loader.batches(
    experiment.train_indices, first
  ) as batches:
    batch = next(batches)
  found, _ = programs.before_step(state, *batch)
  num_stats_batches = norms.NORMS[config.model.norm].NUM_STATS_BATCHES
  if num_stats_batches and config.pretrained_path is None:
    state = experiment.calibrate(state, num_stats_batches)
    seen, _ = programs.before_step(state, *batch)
    found |= {k: x for k, x in seen.items() if not k.startswith("grad_norm")}
  if sharpness:
    found |= programs.sharpness(state)
  found = jax.device_get(found)
  norm = float(np.linalg.norm(found["grad_norm"]))
  of_qk = float(np.square(found["grad_norm_qk"]).sum())
  return {
    "grad_norm": norm,
    "clip_factor": diagnostics.clip_factor(norm, config.grad_norm_clip),
    "grad_share_qk": of_qk / norm**2 if norm else math.nan,
    **measurements.by_name(found, experiment.model.num_layers),
  }


def _summary(model):
  """Returns a row of the table that people read."""
  label, config, numbers = model
  blocks = sum(name.endswith("/attention_entropy") for name in numbers)
  last = measurements.block_name(blocks - 1)

  def of_blocks(quantity):
    places = map(measurements.block_name, range(blocks))
    found = [numbers.get(f"{place}/{quantity}") for place in places]
    return [x for x in found if x is not None]

  def way(tokens):
    name = f"stream_rms_{tokens}"
    ends = (numbers.get(f"{part}/{name}") for part in ("embedding", last))
    return " → ".join(map(_number, ends))

  entropies = of_blocks("attention_entropy")
  gradients = of_blocks("grad_norm")
  saturated = of_blocks("saturation_attention") + of_blocks("saturation_mlp")
  return {
    "model": label,
    "norm": config.model.norm,
    "stream RMS, class token": way("cls"),
    "stream RMS, patches": way("patches"),
    "gradient norm": _number(numbers["grad_norm"]),
    "clip factor": _number(numbers["clip_factor"]),
    "of blocks, first / last": _number(
      gradients[0] / gradients[-1] if gradients and gradients[-1] else None
    ),
    "queries and keys, share": _number(numbers["grad_share_qk"]),
    "attention entropy, nats": _number(
      np.mean(entropies) if entropies else None
    ),
    "saturated": _number(np.mean(saturated) if saturated else None),
    "sharpness": _number(numbers.get("sharpness")),
  }


def _number(x):
  return (
    markdown_lib.NOTHING if x is None or not math.isfinite(x) else f"{x:.3g}"
  )


def _markdown(rows):
  lines = [list(rows[0]), ["---"] * 2 + ["--:"] * (len(rows[0]) - 2)]
  lines += [list(map(markdown_lib.escape, row.values())) for row in rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _csv(found):
  """Returns a row for each part of each model, and one for each as a whole."""
  rows, columns = [], {}
  for label, config, numbers in found:
    parts = {}
    for name, value in numbers.items():
      part, _, quantity = name.rpartition("/")
      parts.setdefault(part or "all", {})[quantity] = value
    for part, values in sorted(parts.items()):
      columns |= dict.fromkeys(values)
      start = {"model": label, "norm": config.model.norm}
      rows.append({**start, "seed": config.seed, "part": part, **values})
  text = io.StringIO()
  table = csv.DictWriter(
    text, ["model", "norm", "seed", "part", *columns], lineterminator="\n"
  )
  table.writeheader()
  table.writerows(rows)
  return text.getvalue()


if __name__ == "__main__":
  sys.exit(main())
