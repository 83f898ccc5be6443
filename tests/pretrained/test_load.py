"""Loading checkpoints: strictness, conversions and values."""

import re

import jax
import numpy as np
import pytest
import trees

from rescalevit_jax.models import norms
from rescalevit_jax.pretrained import load
from rescalevit_jax.pretrained import npz
from rescalevit_jax.pretrained import positions

WITH_STATISTICS = {
  *("BN", "Rescale", "Cal", "BN2", "Fade"),
  *("TaperLN", "TaperRMS", "PRepBN"),
}


def norm_keys(arrays):
  names = r"(Norm|Rescale|Cal|DyT|Derf)_\d|encoder_norm"
  return {k for k in arrays if re.search(names, k)}


@pytest.mark.parametrize("norm", norms.NORMS)
def test_round_trip_is_exact(norm, tmp_path):
  saved = trees.fresh(norm, seed=3)
  path = tmp_path / "a.npz"
  npz.save(path, *saved)
  params, stats, report = load.load(path, *trees.fresh(norm, seed=4))
  trees.same(trees.flat(params, stats), trees.flat(*saved))
  assert set(report.loaded) == trees.flat(*saved).keys()
  assert report == load.Report(loaded=report.loaded)
  assert bool(stats) == (norm in WITH_STATISTICS)


def test_input_trees_are_not_changed(tmp_path):
  given, before = trees.fresh(seed=1), trees.fresh(seed=1)
  load.load(trees.write(tmp_path, trees.arrays()), *given)
  trees.same(trees.flat(*given), trees.flat(*before))


def test_jax_arrays_are_valid_targets(tmp_path):
  saved = trees.arrays("Rescale")
  target = jax.tree.map(jax.numpy.asarray, trees.fresh("Rescale", seed=1))
  params, stats, _ = load.load(trees.write(tmp_path, saved), *target)
  trees.same(trees.flat(params, stats), saved)
  assert all(
    isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves((params, stats))
  )


# The head and pre_logits.


@pytest.mark.parametrize(
  "case", ["other classes", "on request", "none in the file"]
)
def test_head_starts_at_zeros(case, tmp_path):
  saved = trees.arrays(num_classes=5 if case == "other classes" else 3)
  if case == "none in the file":
    saved = {k: v for k, v in saved.items() if k not in trees.HEAD}
  params, _, report = load.load(
    trees.write(tmp_path, saved),
    *trees.fresh(seed=1),
    reinit_head=case == "on request",
  )
  assert params["head"]["kernel"].shape == (8, 3)
  assert params["head"]["kernel"].dtype == np.float32
  assert not params["head"]["kernel"].any()
  assert not params["head"]["bias"].any()
  assert set(report.reinitialized) == trees.HEAD
  assert trees.HEAD.isdisjoint(report.loaded + report.dropped + report.initial)
  reason = {
    "other classes": "5 classes, the model has 3",
    "on request": "config.reinit_head is set",
    "none in the file": "the file has none",
  }[case]
  assert any(reason in note for note in report.notes)
  assert reason in report.summary()


@pytest.mark.parametrize("classes", [3, 5])
def test_pre_logits_missing_from_the_model_are_dropped_with_the_head(
  classes, tmp_path
):
  # The head was trained on tanh(pre_logits).
  saved = trees.arrays(num_classes=classes, representation_size=6)
  params, _, report = load.load(
    trees.write(tmp_path, saved), *trees.fresh(seed=1)
  )
  assert set(report.dropped) == {"pre_logits/kernel", "pre_logits/bias"}
  assert set(report.reinitialized) == trees.HEAD
  assert not params["head"]["kernel"].any()
  assert "pre_logits" not in params
  assert "pre_logits" in "".join(report.notes)


@pytest.mark.parametrize("classes", [3, 5])
def test_pre_logits_of_the_model_are_loaded(classes, tmp_path):
  saved = trees.arrays(num_classes=classes, representation_size=6)
  params, _, report = load.load(
    trees.write(tmp_path, saved), *trees.fresh(seed=1, representation_size=6)
  )
  kept = {"pre_logits/kernel", "pre_logits/bias"} | (
    trees.HEAD if classes == 3 else set()
  )
  assert kept <= set(report.loaded)
  assert not report.dropped
  np.testing.assert_array_equal(
    params["pre_logits"]["kernel"], saved["pre_logits/kernel"]
  )
  assert bool(params["head"]["kernel"].any()) == (classes == 3)


def test_pre_logits_missing_from_the_file_are_an_error(tmp_path):
  target = trees.fresh(representation_size=8)
  trees.refuses(
    trees.write(tmp_path, trees.arrays()),
    "pre_logits/kernel",
    "(8, 8)",
    target=target,
  )


@pytest.mark.parametrize("reinit_head", [False, True])
@pytest.mark.parametrize(
  "head, shown",
  [
    ({"head/kernel": (6, 3)}, ["head/kernel", "(6, 3)", "(8, 3)"]),
    ({"head/kernel": (6, 5), "head/bias": (5,)}, ["(6, 5)", "(8, 3)"]),
    ({"head/kernel": (8, 5)}, ["head/kernel", "(8, 5)", "(8, 3)"]),
    ({"head/bias": (5,)}, ["head/bias", "(5,)", "(3,)"]),
    ({"head/kernel": ()}, ["head/kernel", "()", "(8, 3)"]),
    ({"head/bias": None}, ["head/bias", "missing", "(3,)"]),
    ({"head/kernel": None}, ["head/kernel", "missing", "(8, 3)"]),
  ],
)
def test_a_head_of_another_model_is_an_error(
  head, shown, reinit_head, tmp_path
):
  arrays = trees.arrays()
  for key, shape in head.items():
    del arrays[key]
    if shape is not None:
      arrays[key] = np.ones(shape, np.float32)
  trees.refuses(trees.write(tmp_path, arrays), *shown, reinit_head=reinit_head)


# Strictness.


@pytest.mark.parametrize(
  "key",
  [
    "cls",
    "embedding/bias",
    trees.POSITIONS,
    "Transformer/encoder_norm/scale",
    trees.BLOCK + "LayerNorm_0/bias",
    trees.BLOCK + "MlpBlock_3/Dense_1/kernel",
    trees.BLOCK + "MultiHeadDotProductAttention_1/out/kernel",
  ],
)
@pytest.mark.parametrize("prefix", ["", "params/"])
def test_missing_extra_and_misshapen_keys_are_errors(key, prefix, tmp_path):
  arrays = trees.arrays()
  ours = arrays[key].shape
  theirs = (*ours[:-1], ours[-1] + 1)

  def file(**changed):
    changed = {k: v for k, v in (arrays | changed).items() if v is not None}
    return trees.write(tmp_path, {prefix + k: v for k, v in changed.items()})

  trees.refuses(file(**{key: None}), key, "missing", str(ours))
  message = trees.refuses(
    file(**{key: np.ones(theirs, "f4")}), key, str(theirs), str(ours)
  )
  assert "does not fit the model" in message
  extra = key + "x"
  trees.refuses(
    file(**{extra: np.ones(theirs, "f4")}), prefix + extra, str(theirs)
  )


def test_three_of_many_mismatches_are_named(tmp_path):
  arrays = {
    k: np.ones((7, *v.shape), "f4") if "Dense" in k else v
    for k, v in trees.arrays().items()
  }
  message = trees.refuses(
    trees.write(tmp_path, arrays), "and 5 more", "(7, 8, 16)", "(8, 16)"
  )
  assert message.count("has shape") == 3


@pytest.mark.parametrize(
  "key, value, part",
  [
    ("cls", np.ones((1, 1, 8), np.int32), "int32"),
    ("cls", np.ones((1, 1, 8), bool), "bool"),
    ("cls", np.array("text"), "<U4"),
    ("cls", np.ones((1, 1, 8), np.complex64), "complex64"),
    ("cls", np.array(1.0), "()"),
    ("embedding/kernel", np.array(1.0), "()"),
    ("cls", np.full((1, 1, 8), np.nan, "f4"), "NaN"),
    ("cls", np.full((1, 1, 8), 1e300), "infinite"),
    (trees.POSITIONS, np.full((1, 17, 8), np.inf, "f4"), "infinite"),
    (trees.POSITIONS, np.ones((1, 17, 8), np.int32), "int32"),
    (trees.POSITIONS, np.array(1.0), "()"),
  ],
)
def test_invalid_weights_are_errors(key, value, part, tmp_path):
  trees.refuses(trees.write(tmp_path, trees.arrays() | {key: value}), key, part)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_weights_are_accepted_on_request(value, tmp_path):
  saved = trees.arrays()
  saved["cls"][0, 0, 3] = value
  path = trees.write(tmp_path, saved)
  trees.refuses(path, "cls", "--config.pretrained_allow_nonfinite=True")
  loaded = load.load(path, *trees.fresh(seed=1), allow_nonfinite=True)
  trees.same(trees.flat(*loaded[:2]), saved)


@pytest.mark.parametrize(
  "value, words",
  [
    (np.array(8.0, np.float32), ("float32", "int32")),
    (np.array(2**40 + 5), ("values that do not fit int32",)),
  ],
)
def test_a_counter_must_be_an_integer_of_32_bits(value, words, tmp_path):
  count = f"batch_stats/{trees.BLOCK}Rescale_0/count"
  path = trees.write(tmp_path, trees.arrays("Rescale") | {count: value})
  trees.refuses(path, count, *words, target=trees.fresh("Rescale"))


# Norms.


@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_ln_into_a_norm_with_the_same_names(norm, tmp_path):
  saved, target = trees.arrays("LN"), trees.fresh(norm, seed=1)
  params, stats, report = load.load(trees.write(tmp_path, saved), *target)
  trees.same(trees.flat(params, {}), saved)
  trees.same(trees.flat({}, stats), trees.flat({}, target[1]))
  assert set(report.loaded) == saved.keys()
  assert set(report.initial) == trees.stats_keys(trees.flat(*target))
  assert not report.dropped


@pytest.mark.parametrize(
  "source, norm",
  [
    ("LN", "Rescale"),
    ("BN", "Rescale"),
    ("Rescale", "LN"),
    ("Rescale", "BN"),
  ],
)
def test_a_norm_with_other_names_keeps_its_initial_values(
  source, norm, tmp_path
):
  saved, target = trees.arrays(source), trees.arrays(norm, seed=1)
  params, stats, report = load.load(
    trees.write(tmp_path, saved), *trees.fresh(norm, seed=1)
  )
  own = norm_keys(target)
  assert len(own) == {"LN": 10, "BN": 20, "Rescale": 14}[norm]
  trees.same(
    trees.flat(params, stats),
    {k: (target if k in own else saved)[k] for k in target},
  )
  assert set(report.initial) == own
  assert set(report.dropped) == norm_keys(saved)
  assert set(report.loaded) == target.keys() - own
  assert any("norm" in note for note in report.notes)


@pytest.mark.parametrize(
  "source, norm",
  [
    ("LN", "Cal"),
    ("LN", "DyT"),
    ("BN", "Derf"),
    ("Derf", "Cal"),
    ("Cal", "LN"),
    ("DyT", "BN"),
  ],
)
def test_scale_and_bias_are_copied_to_another_norm(source, norm, tmp_path):
  saved, target = trees.arrays(source), trees.arrays(norm, seed=1)
  params, stats, report = load.load(
    trees.write(tmp_path, saved), *trees.fresh(norm, seed=1)
  )
  theirs, ours = (norms.NORMS[name].SLOT for name in (source, norm))
  moved = {k.replace(theirs, ours): v for k, v in saved.items()}
  affine = {k for k in moved if k.endswith(("/scale", "/bias"))}
  assert len(affine & norm_keys(target)) == 10
  own = {k for k in norm_keys(target) if k not in affine}
  trees.same(
    trees.flat(params, stats),
    {k: (target if k in own else moved)[k] for k in target},
  )
  assert set(report.initial) == own
  assert set(report.dropped) == {
    k for k in norm_keys(saved) if not k.endswith(("/scale", "/bias"))
  }
  assert len(report.carried) == 8  # Final norms have equal names.
  assert {*report.carried} <= affine and not {*report.carried} & {
    *report.loaded
  }
  assert any("only scale and bias" in note for note in report.notes)


@pytest.mark.parametrize(
  "source, norm, options",
  [
    ("BN", "PRepBN", {}),
    ("PRepBN", "BN", {}),
    ("Fade", "TaperLN", {}),
    ("RMS", "TaperRMS", {}),
    ("TaperRMS", "BHyT", {}),
    ("LN", "DyT", {"embedding_norm": True}),
    ("PRepBN", "BN", {"embedding_norm": True}),
    ("BN", "LN", {"norm_position": "peri"}),
    ("BN", "Fade", {"norm_position": "peri"}),
    ("TaperLN", "PRepBN", {"norm_position": "peri"}),
    ("LN", "Cal", {"norm_position": "peri"}),
  ],
)
def test_only_scale_and_bias_of_another_norm_load(
  source, norm, options, tmp_path
):
  """Final norms may have other arrays with equal names."""
  path = trees.write(tmp_path, trees.arrays(source, **options))
  target = trees.arrays(norm, seed=1, **options)
  params, stats, _ = load.load(path, *trees.fresh(norm, seed=1, **options))
  found = trees.flat(params, stats)
  for key, x in target.items():
    is_affine = key.endswith(("/scale", "/bias"))
    is_norm = re.search(r"_norm/|encoderblock_\d/[^/]+/\w+$", key)
    stays = is_norm and not is_affine
    assert np.array_equal(found[key], x) == bool(stays), key


@pytest.mark.parametrize("source, model", [("pre", "post"), ("post", "peri")])
def test_post_norms_load_into_post_norms_only(source, model, tmp_path):
  path = trees.write(tmp_path, trees.arrays(norm_position=source))
  trees.refuses(
    path,
    f"norm_position={source}, the model has {model}; set --config",
    target=trees.fresh("LN", seed=1, norm_position=model),
  )


def test_a_second_norm_at_one_site_drops_all_norms(tmp_path):
  saved = trees.arrays("LN")
  stray = "Transformer/encoderblock_0/Foo_0/scale"
  saved[stray] = np.full(8, 7, np.float32)
  _, _, report = load.load(
    trees.write(tmp_path, saved), *trees.fresh("Cal", seed=1)
  )
  assert not report.carried and {*report.dropped} == norm_keys(saved) | {stray}


def test_a_missing_scale_of_another_norm_is_named(tmp_path):
  saved = trees.arrays("LN")
  del saved["Transformer/encoderblock_1/LayerNorm_2/scale"]
  trees.refuses(
    trees.write(tmp_path, saved),
    "encoderblock_1/Cal_2/scale",
    "missing",
    target=trees.fresh("Cal", seed=1),
  )


def test_missing_parameters_keep_the_given_initial_values(tmp_path):
  target = trees.fresh("Rescale", seed=1)
  params, stats, _ = load.load(
    trees.write(tmp_path, trees.arrays("LN")), *target
  )
  block = "encoderblock_0"
  for got, given in zip((params, stats), target, strict=True):
    got, given = (t["Transformer"][block]["Rescale_2"] for t in (got, given))
    assert all(got[leaf] is given[leaf] for leaf in given)


@pytest.mark.parametrize("norm", ["LN", "GN"])
def test_statistics_missing_from_the_model_are_dropped(norm, tmp_path):
  saved = trees.arrays("BN")
  params, stats, report = load.load(
    trees.write(tmp_path, saved), *trees.fresh(norm, seed=1)
  )
  assert stats == {}
  assert set(report.dropped) == trees.stats_keys(saved)
  trees.same(
    trees.flat(params, {}),
    {k: v for k, v in saved.items() if k not in report.dropped},
  )


@pytest.mark.parametrize("norm", ["BN", "Rescale"])
def test_incomplete_statistics_are_an_error(norm, tmp_path):
  saved = trees.arrays(norm)
  key = sorted(trees.stats_keys(saved))[3]
  shape = str(saved.pop(key).shape)
  trees.refuses(
    trees.write(tmp_path, saved),
    key,
    "missing",
    shape,
    target=trees.fresh(norm, seed=1),
  )


@pytest.mark.parametrize("norm", ["LN", "BN"])
def test_incomplete_norms_are_an_error(norm, tmp_path):
  saved = trees.arrays(norm)
  for part in ("LayerNorm_0", "LayerNorm_2", "encoder_norm"):
    rest = {k: v for k, v in saved.items() if part not in k}
    trees.refuses(
      trees.write(tmp_path, rest),
      part,
      "missing",
      "(8,)",
      target=trees.fresh(norm, seed=1),
    )
  none = {k: v for k, v in saved.items() if k not in norm_keys(saved)}
  trees.refuses(
    trees.write(tmp_path, none),
    "encoder_norm",
    "missing",
    target=trees.fresh(norm, seed=1),
  )


def test_scale_and_bias_of_an_unknown_norm_load(tmp_path):
  params, _ = trees.fresh("LN", seed=1)
  blocks = params["Transformer"]
  final = dict(blocks["encoder_norm"], alpha=np.ones(1, np.float32))
  blocks["encoder_norm"] = final
  for i in range(2):
    block = blocks[f"encoderblock_{i}"]
    block["DyT_0"] = dict(block.pop("LayerNorm_0"), alpha=final["alpha"])
    block["DyT_2"] = dict(block.pop("LayerNorm_2"), alpha=final["alpha"])
  path = trees.write(tmp_path, trees.arrays("LN"))
  _, _, report = load.load(path, params, {})
  assert not report.dropped
  assert set(report.initial) == {
    k for k in trees.flat(params, {}) if k.endswith("/alpha")
  }
  path = trees.write(tmp_path, trees.flat(params, {}), "dyt.npz")
  got, _, report = load.load(path, params, {})
  trees.same(trees.flat(got, {}), trees.flat(params, {}))
  assert not report.initial and not report.dropped


# Options of a model.


EVERYTHING = dict(residual="skipinit", qk_norm=True, sigma_reparam=True)


@pytest.mark.parametrize(
  "norm, options",
  [
    ("LN", {}),
    ("Cal", EVERYTHING),
    ("BN", EVERYTHING),
    ("BN2", {}),
    ("Identity", EVERYTHING),
    ("LN", {"residual": "rescalevit"}),
  ],
)
@pytest.mark.parametrize("source", ["LN", "LN with everything", "BN"])
def test_plain_weights_load_into_any_model_and_back(
  norm, options, source, tmp_path
):
  given = EVERYTHING if source == "LN with everything" else {}
  path = trees.write(tmp_path, trees.arrays(source[:2], **given))
  target = trees.fresh(norm, seed=1, **options)
  params, stats, report = load.load(path, *target)
  for kind in ("SkipInit_2/scale", "query_norm/scale", "gamma"):
    both = given == options == EVERYTHING
    assert any(kind in key for key in report.loaded) == both
  assert any("Dense_0/kernel" in key for key in report.loaded)
  trees.same(
    {k: x for k, x in trees.flat(params, stats).items() if k in report.initial},
    {k: x for k, x in trees.flat(*target).items() if k in report.initial},
  )
  back = trees.write(tmp_path, trees.flat(*target), "back.npz")
  plain = trees.fresh("LN", seed=2)
  if norm != "Identity":
    _, _, report = load.load(back, *plain)
    assert all("Norm" in k or "norm" in k for k in report.initial)


def test_parameters_of_another_residual_stay_initial(tmp_path):
  path = trees.write(tmp_path, trees.arrays("Cal", residual="layerscale"))
  target = trees.fresh("Cal", residual="rescalenet", seed=1)
  *_, report = load.load(path, *target)
  assert len(report.initial) == len(report.dropped) == 4
  assert all("RescaleNet" in key for key in report.initial)
  assert all("LayerScale" in key for key in report.dropped)
  *_, report = load.load(path, *trees.fresh("Cal"))
  assert "the file's arrays of residual are dropped" in " ".join(report.notes)


def test_an_incomplete_residual_is_an_error(tmp_path):
  saved = trees.arrays(residual="skipinit")
  key = trees.BLOCK + "SkipInit_2/scale"
  del saved[key]
  target = trees.fresh(residual="skipinit")
  trees.refuses(
    trees.write(tmp_path, saved), key, "missing", "(1,)", target=target
  )


# The position embedding.


@pytest.mark.parametrize("image_size, tokens", [(12, 10), (4, 2)])
def test_position_embedding_is_resized_to_the_grid(
  image_size, tokens, tmp_path
):
  saved = trees.arrays()
  params, _, report = load.load(
    trees.write(tmp_path, saved), *trees.fresh(seed=1, image_size=image_size)
  )
  got = params["Transformer"]["posembed_input"]["pos_embedding"]
  np.testing.assert_array_equal(
    got, positions.resize(saved[trees.POSITIONS], tokens)
  )
  assert got.dtype == np.float32
  assert report.resized == (trees.POSITIONS,)
  assert trees.POSITIONS not in report.loaded
  assert f"5 to {tokens} tokens" in report.summary()


def test_position_embedding_without_a_square_grid_is_an_error(tmp_path):
  arrays = trees.arrays()
  arrays[trees.POSITIONS] = np.ones((1, 7, 8), np.float32)
  trees.refuses(
    trees.write(tmp_path, arrays),
    trees.POSITIONS,
    "(1, 7, 8)",
    "(1, 5, 8)",
    "square",
  )


@pytest.mark.parametrize("old, new", [(5, 0), (5, 1), (5, 6), (3, 5), (1, 5)])
def test_resize_refuses_grids_that_are_not_square(old, new):
  with pytest.raises(ValueError, match="square"):
    positions.resize(np.ones((1, old, 2)), new)


@pytest.mark.parametrize(
  "old, new", [(2, 9), (7, 5), (12, 14), (14, 24), (24, 7), (40, 39), (3, 1)]
)
def test_resize_equals_scipys_zoom(old, new):
  ndimage = pytest.importorskip("scipy.ndimage")
  pos = np.random.default_rng(0).normal(size=(1, 1 + old * old, 3))
  grid = ndimage.zoom(
    pos[0, 1:].reshape(old, old, 3), (new / old, new / old, 1), order=1
  )
  got = positions.resize(pos, 1 + new * new)
  assert got.dtype == np.float32
  np.testing.assert_allclose(
    got[0, 1:].reshape(new, new, 3), grid, atol=1e-6, rtol=0
  )
  np.testing.assert_array_equal(got[0, 0], pos[0, 0].astype(np.float32))


def test_resize_keeps_planes_on_every_grid():
  # Bilinear interpolation reproduces a plane. Scipy does not for some pairs
  # (8 to 26, 24 to 22), where it leaves a row or column of zeros.
  for old in range(1, 41):
    y, x = np.mgrid[:old, :old] / max(old - 1, 1)
    pos = np.concatenate([[9.0], (1 + 2 * y + 3 * x).ravel()])[None, :, None]
    for new in range(1, 41):
      got = positions.resize(pos, 1 + new * new)[0, :, 0]
      y, x = np.mgrid[:new, :new] / max(new - 1, 1) * (old > 1)
      assert got[0] == 9
      assert np.abs(got[1:] - (1 + 2 * y + 3 * x).ravel()).max() < 1e-6


# The report.


def test_summary_combines_blocks(tmp_path):
  sizes = dict(num_layers=24)
  saved = trees.arrays("LN", num_classes=5, **sizes)
  extra = {f"opt/{i}/count": np.ones(1, "f4") for i in range(50)}
  path = trees.write(
    tmp_path, {f"params/{k}": v for k, v in saved.items()} | extra
  )
  *_, report = load.load(
    path, *trees.fresh("Rescale", image_size=12, seed=1, **sizes)
  )
  summary = report.summary()
  assert len(summary.splitlines()) < 60
  assert "encoderblock_1" not in summary
  block = "Transformer/encoderblock_*/"
  for part in (
    f"loaded: {len(report.loaded)} arrays",
    f"{block}MultiHeadDotProductAttention_1/query/{{bias,kernel}}",
    "resized: 1 array\n",
    trees.POSITIONS,
    "set to zeros: 2 arrays",
    "head/{bias,kernel}",
    f"left at initial values: {24 * 7} arrays",
    f"{block}Rescale_0/bias",
    f"{block}Rescale_2/{{bias,scale}}",
    f"batch_stats/{block}Rescale_0/{{count,init_mean}}",
    f"dropped from the file: {24 * 4 + 2 + 50} arrays",
    f"params/{block}LayerNorm_0/{{bias,scale}}",
    "more",
  ):
    assert part in summary
