r"""Plot norm outputs against inputs, by depth.

python -m rescalevit_jax.analysis.norm_curves --workdir=runs/a
python -m rescalevit_jax.analysis.norm_curves --config=configs/norm_free.py:LN \
    --config=configs/norm_free.py:DyT
python -m rescalevit_jax.analysis.norm_curves --config=configs/cifar_small.py

A point is one channel of one token of a test image. The output is shown before
the norm's scale and bias, as in Zhu et al. 2025 (arXiv:2503.10622, figure 2).
This shows the bounds of a bounded function. LayerNorm is a fan of lines: its
slope depends on the token. A config gives a fresh model; without :ARGS it
expands to all METHODS of its file, or to every norm.

Writes norm_curves.csv, norm_curves.png and norm_curves.svg.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import logging
import pathlib
import sys
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float32, UInt8
from matplotlib import figure as figure_lib
import numpy as np

from rescalevit_jax import errors
from rescalevit_jax.analysis import diagnostics_plots
from rescalevit_jax.analysis import plots
from rescalevit_jax.analysis import probe
from rescalevit_jax.analysis import subjects
from rescalevit_jax.augment import preprocess
from rescalevit_jax.config import overrides
from rescalevit_jax.models.norms import base
from rescalevit_jax.runtime import cli
from rescalevit_jax.runtime import terminal
from rescalevit_jax.training import experiment as experiment_lib
from rescalevit_jax.training import initial_state

_log = logging.getLogger("rescalevit_jax.analysis.norm_curves")

_IMAGES = 32
_POINTS = 1000  # Of each kind of token at each site.
_COLUMNS = 6
_TOKENS = {"patches": "#56B4E9", "class token": "#D55E00"}

# Input and output of one site by kind of token, [points] each.
Pairs = dict[
  str, tuple[Float32[np.ndarray, " points"], Float32[np.ndarray, " points"]]
]


def main(argv: Sequence[str] | None = None) -> int:
  """Draw the curves; return the exit code."""
  terminal.log_to_stderr()
  return cli.run(lambda: _run(argv))


def _run(argv):
  rest, settings = overrides.split_argv(cli.arguments(argv))
  parser = cli.parser(__doc__, allow_abbrev=False)
  parser.add_argument(
    "--workdir", action="append", default=[], help="a run; repeatable"
  )
  parser.add_argument(
    "--config",
    action="append",
    default=[],
    metavar="FILE[:ARGS]",
    help="a config; repeatable. --config.KEY=VALUE sets a key for all configs",
  )
  subjects.add_checkpoint_flag(parser)
  parser.add_argument(
    "--output",
    type=pathlib.Path,
    default=pathlib.Path("norm_curves"),
    help="output folder (default: norm_curves)",
  )
  args = parser.parse_args(rest)
  if not args.workdir and not args.config:
    parser.error("name models with --workdir or --config")
  if settings and not args.config:
    raise errors.UserError(
      f"--config.{settings[0]}: has no effect on runs; add --config, or leave"
      " it out"
    )
  configs = probe.load_configs(args.config, settings, [()])
  found = {}
  for subject in subjects.load(args.workdir, [], args.checkpoint):
    model = subject.model
    images = _first(subject.test_split)
    found[model.name] = measure(
      model.model, model.variables, images, model.image_size
    )
  for i, (label, config) in enumerate(configs.items(), start=1):
    _log.info("%s: model %d of %d", label, i, len(configs))
    experiment = experiment_lib.create(config)
    state = initial_state.create(experiment)
    state = probe.with_statistics(experiment, state)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    images = _first(experiment.dataset.test)
    found[f"{label} (fresh)" if label in found else label] = measure(
      experiment.model, variables, images, config.image_size
    )
  plots.save_with_table(
    functools.partial(draw, found), _table(found), args.output / "norm_curves"
  )


def _first(split):
  return split.read(range(min(_IMAGES, len(split))))[0]


def measure(
  model: nn.Module,
  variables: Mapping[str, Any],
  images: UInt8[np.ndarray, "B H W 3"],
  image_size: int,
) -> dict[str, Pairs]:
  """Return random inputs of each norm with their outputs, in evaluation mode.

  The pairs are by site, from the first block to the final norm. Scale and bias
  of the norm are removed from the outputs.
  """
  model = model.clone(config=dataclasses.replace(model.config, remat=False))
  sites: list[tuple[str, ...]] = []

  def forward(variables, images):
    found = []

    def record(method, args, kwargs, context):
      y = method(*args, **kwargs)
      path = context.module.path
      is_norm = isinstance(context.module, base.Norm) and len(path) <= 3
      if is_norm and context.method_name == "__call__":
        sites.append(path)
        found.append((args[0].astype("float32"), y.astype("float32")))
      return y

    with nn.intercept_methods(record):
      model.apply(variables, images, train=False, mutable=["intermediates"])
    return found

  x = preprocess.prepare(jnp.asarray(images), image_size)
  found = jax.device_get(jax.jit(forward)(dict(variables), x))
  random = np.random.default_rng(0)
  pairs = {}
  for path, (x, y) in zip(sites, found, strict=True):
    y = _without_affine(y, variables["params"], path)
    pairs[_site_name(path)] = {
      token: _sample(random, x[:, of], y[:, of])
      for token, of in (("patches", np.s_[1:]), ("class token", np.s_[:1]))
    }
  return pairs


def _without_affine(y, params, path):
  """Invert scale and bias, unless the norm has other channel parameters."""
  for name in path:
    params = params.get(name, {})
  params = {
    name: np.asarray(x)
    for name, x in params.items()
    if np.shape(x) == y.shape[-1:]
  }
  if not params.keys() <= {"scale", "bias"}:
    return y
  scale = params.get("scale", np.float32(1))
  return (y - params.get("bias", 0)) / np.where(scale == 0, np.nan, scale)


def _site_name(path):
  if len(path) == 2:
    return "final norm" if path[1] == "encoder_norm" else "embedding norm"
  block = path[1].removeprefix("encoderblock_")
  branch = {"0": "attention", "2": "MLP"}[path[2][-1]]
  after = "after " if path[2].startswith(("Peri", "Post")) else ""
  return f"block {block}, {after}{branch}"


def _sample(random, x, y):
  chosen = random.permutation(x.size)[:_POINTS]
  return x.ravel()[chosen], y.ravel()[chosen]


def draw(models: Mapping[str, Mapping[str, Pairs]]) -> figure_lib.Figure:
  """Draw results of `measure` below each other, by increasing depth."""
  columns = min(_COLUMNS, max(map(len, models.values())))
  figure = figure_lib.Figure(
    figsize=(2.6 * columns + 0.6, 2.3 * len(models) + 0.6),
    layout="constrained",
  )
  grid = figure.subplots(len(models), columns, squeeze=False)
  for row, (label, sites) in zip(grid, models.items(), strict=True):
    names = list(sites)
    chosen = np.linspace(0, len(names) - 1, columns).round().astype(int)
    for ax, i in zip(row, chosen, strict=True):
      for token, color in _TOKENS.items():
        x, y = sites[names[i]][token]
        ax.plot(x, y, ".", ms=2, color=color, label=token, rasterized=True)
      ax.set_title(names[i], fontsize="small")
      diagnostics_plots.tidy(ax)
    row[0].set_ylabel(f"{plots.plain(label)}\noutput", fontsize="small")
  for ax in grid[-1]:
    ax.set_xlabel("input", fontsize="small")
  figure.suptitle(
    "Norms: output before scale and bias, over input", fontsize="medium"
  )
  plots.legend_below(grid[0, 0], len(_TOKENS), markerscale=4, fontsize="small")
  return figure


def _table(models):
  yield "model", "site", "token", "input", "output"
  for label, sites in models.items():
    for site, tokens in sites.items():
      for token, pairs in tokens.items():
        for x, y in zip(*pairs, strict=True):
          yield label, site, token, f"{x:.6g}", f"{y:.6g}"


if __name__ == "__main__":
  sys.exit(main())
