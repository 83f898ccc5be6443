"""Folding a norm into the next layer gives an equivalent model."""

import jax
import numpy as np
import pytest
import trees

from rescalevit_jax import errors
from rescalevit_jax import models
from rescalevit_jax.analysis import npz_model
from rescalevit_jax.pretrained import fold
from rescalevit_jax.pretrained import npz


def small(path, x):
  """Return weights that give distinct, finite logits."""
  if np.issubdtype(x.dtype, np.integer):
    return x
  return np.abs(x) if path[-1].key == "var" else 0.5 * x


@pytest.mark.parametrize(
  "norm, residual, options",
  [
    ("Cal", "plain", {"representation_size": 6}),
    ("Cal", "rescalenet", {"sigma_reparam": True}),
    ("Cal", "rescalevit", {"qk_norm": True}),
    ("Rescale", "rescalevit", {}),
    ("Rescale", "layerscale", {}),
    ("BN", "plain", {"representation_size": 6}),
    ("BN", "rescalevit", {"sigma_reparam": True}),
    ("BN", "plain", {"qk_norm": True, "pool": "gap"}),
    ("BN2", "skipinit", {}),
    ("Center", "weighted", {}),
  ],
)
def test_folded_model_gives_the_same_logits(norm, residual, options, tmp_path):
  params, stats = jax.tree_util.tree_map_with_path(
    small, trees.fresh(norm, residual=residual, seed=9, **options)
  )
  if "pre_logits" in params:  # Avoids saturated tanh.
    params["pre_logits"]["kernel"] *= 0.1
  x = np.random.default_rng(0).uniform(-1, 1, (5, 8, 8, 3)).astype(np.float32)
  model = models.create(
    "ViT-B_16",
    num_classes=3,
    image_size=8,
    norm=norm,
    residual=residual,
    **trees.TINY,
    **options,
  )
  want = model.apply({"params": params, "batch_stats": stats}, x)

  before = trees.flat(params, stats)
  npz.save(tmp_path / "a.npz", *fold.fold(norm, params, stats))
  trees.same(trees.flat(params, stats), before)
  pool = options.get("pool", "cls")
  folded = npz_model.load(tmp_path / "a.npz", pool=pool)
  assert folded.model.config.norm == "Identity"
  assert folded.model.config.residual == residual
  assert not folded.model.config.sigma_reparam
  found = folded.model.apply(folded.variables, x)
  # Differences between images are larger.
  error = np.abs(found - want).max()
  assert error < 1e-4 * np.abs(want).max()
  assert error < 0.03 * np.ptp(want, axis=0).min()
  names = trees.flat(*trees.fresh("Identity", residual=residual))
  assert names.keys() <= trees.flat(**folded.variables).keys()


@pytest.mark.parametrize("norm", ["LN", "GN", "RMS", "DyT", "Derf"])
def test_folding_other_norms_is_an_error(norm):
  words = "does not fold.*BN, Rescale, Cal"
  with pytest.raises(errors.UserError, match=words):
    fold.fold(norm, *trees.fresh(norm))
