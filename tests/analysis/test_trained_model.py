"""Loading trained models from runs and files, and classifying images."""

import dataclasses
import json
import shutil

import jax
import numpy as np
from PIL import Image
import pytest
import trees

from rescalevit_jax import errors
from rescalevit_jax import models
from rescalevit_jax.analysis import npz_model
from rescalevit_jax.analysis import trained_model
from rescalevit_jax.augment import preprocess
from rescalevit_jax.data import image_files
from rescalevit_jax.models import norms
from rescalevit_jax.pretrained import npz
from rescalevit_jax.runs import checkpoint

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (7, 10, 14, 3), dtype=np.uint8)


@pytest.fixture
def copied(tiny_run, tmp_path):
  return shutil.copytree(tiny_run, tmp_path / "run")


class Colors:
  """A model whose logits are the means of the color channels."""

  traces = 0

  def apply(self, variables, x, train):
    assert not train
    self.traces += 1
    return x.mean((1, 2)) * variables["params"]


@pytest.fixture
def colors():
  names = ("red", "green", "blue")
  return trained_model.TrainedModel(
    "colors", Colors(), {"params": 3.0}, 4, names
  )


# Calling.


def test_probabilities_of_each_image(colors):
  found = colors(list(IMAGES), batch=3)
  assert found.shape == (7, 3) and found.dtype == np.float32
  means = preprocess.prepare(IMAGES, 4).mean((1, 2))
  np.testing.assert_allclose(found, jax.nn.softmax(3 * means), atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3, 7, 64])
def test_batches_of_any_size_compile_once(batch, colors):
  found = colors(IMAGES, batch=batch)
  assert colors.model.traces == 1
  np.testing.assert_allclose(found[2:3], colors([IMAGES[2]]), atol=1e-6)


def test_images_are_arrays_pillow_images_or_paths(colors, tmp_path):
  for i, image in enumerate(IMAGES):
    Image.fromarray(image).save(tmp_path / f"{i}.png")
  expected = colors(IMAGES)
  paths = sorted(tmp_path.iterdir())
  np.testing.assert_array_equal(colors(paths), expected)
  np.testing.assert_array_equal(colors(map(str, paths)), expected)
  opened = [Image.open(path) for path in paths]
  np.testing.assert_array_equal(colors(opened), expected)


def test_one_array_of_gray_images_is_a_batch(colors):
  grays = IMAGES[..., 0]
  np.testing.assert_array_equal(colors(grays), colors(list(grays)))


def test_arrays_and_paths_have_the_same_first_resizing(colors, tmp_path):
  image = IMAGES[0][:, :10]
  Image.fromarray(image).save(tmp_path / "a.png")
  model = dataclasses.replace(
    colors, resize=image_files.Resize(10, "crop", 0.5)
  )
  found = model([image])
  np.testing.assert_array_equal(found, model([tmp_path / "a.png"]))
  assert np.abs(found - colors([image])).max() > 0


def test_no_images_give_an_empty_array(colors):
  assert colors([]).shape == (0, 3)


def test_a_single_image_is_an_error(colors, tmp_path):
  Image.fromarray(IMAGES[0]).save(tmp_path / "a.png")
  path = tmp_path / "a.png"
  gray = IMAGES[0][..., 0]
  for image in (path, str(path), IMAGES[0], gray, Image.fromarray(gray)):
    with pytest.raises(errors.UserError, match="pass a list of images"):
      colors(image)


def test_an_unreadable_image_is_an_error(colors, tmp_path):
  with pytest.raises(errors.UserError, match=r"none\.png.*no such file"):
    colors([IMAGES[0], tmp_path / "none.png"])


def test_top_returns_the_most_probable_classes(colors):
  row = np.array([0.2, 0.5, 0.3], np.float32)
  found = colors.top(row)
  assert [name for name, _ in found] == ["green", "blue", "red"]
  assert found[0][1] == 0.5 and type(found[0][1]) is float
  assert colors.top(row, 2) == found[:2]
  # As in argmax, the first of equal values.
  assert colors.top(np.array([0.2, 0.4, 0.4]), 1) == [("green", 0.4)]


# Runs.


@pytest.mark.parametrize("which", ["best", "latest"])
def test_accuracy_equals_the_result_of_the_run(which, tiny_run, test_digits):
  model = trained_model.load(tiny_run, which)
  result = json.loads((tiny_run / "result.json").read_text())
  key = "best_accuracy" if which == "best" else "last_accuracy"
  probabilities = model(test_digits.images, batch=100)
  np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)
  right = probabilities.argmax(axis=1) == test_digits.labels
  assert np.mean(right) == pytest.approx(result[key], abs=1e-9)
  assert result["examples_evaluated"] == len(probabilities) == 360
  assert model.name == "tiny_run" and model.image_size == 12
  assert model.class_names == tuple("0123456789")


def test_the_requested_checkpoint_is_loaded(copied):
  best, last = (copied / "checkpoints" / k for k in ("best", "last"))
  shutil.rmtree(best)
  found = trained_model.load(copied, "latest").variables
  params, _, _ = checkpoint.load_variables(copied, "latest")
  jax.tree.map(np.testing.assert_array_equal, found["params"], params)
  with pytest.raises(errors.UserError, match="no best checkpoint"):
    trained_model.load(copied)
  shutil.copytree(last, best)
  shutil.rmtree(last)
  assert trained_model.load(str(copied)).image_size == 12


@pytest.mark.parametrize(
  ("old", "new", "words"),
  [
    ('"num_layers": 2', '"num_layers": 3', "is missing"),
    ('"norm": "Rescale"', '"norm": "LN"', "Rescale_0"),
    ('"image_size": 12', '"image_size": 24', "pos_embedding"),
  ],
)
def test_checkpoint_of_another_model_is_an_error(old, new, words, copied):
  path = copied / "config.json"
  text = path.read_text()
  assert old in text
  path.write_text(text.replace(old, new))
  with pytest.raises(errors.UserError, match="does not match config") as caught:
    trained_model.load(copied)
  assert words in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_norm_in_the_config_is_an_error(copied):
  text = (copied / "config.json").read_text()
  (copied / "config.json").write_text(text.replace('"Rescale"', '"NewNorm"'))
  with pytest.raises(errors.UserError, match="by another version.*NewNorm"):
    trained_model.load(copied)


def test_a_run_from_another_device_loads(copied):
  path = copied / "config.json"
  text = path.read_text()
  assert '"attention": "auto"' in text
  path.write_text(text.replace('"attention": "auto"', '"attention": "cudnn"'))
  assert trained_model.load(copied).model.config.attention == "xla"


def test_class_names_of_a_run(copied):
  path = copied / "class_names.json"
  names = [f"class, {i}" for i in range(10)]
  path.write_text(json.dumps(names))
  assert trained_model.load(copied).class_names == tuple(names)
  path.unlink()  # Older runs do not store class names.
  assert trained_model.load(copied).class_names == tuple("0123456789")
  for text in ("[", "3", json.dumps(list(range(10))), json.dumps(["a"] * 9)):
    path.write_text(text)
    with pytest.raises(errors.UserError, match=r"class_names\.json") as caught:
      trained_model.load(copied)
    assert "delete it" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_run_is_an_error(tmp_path):
  with pytest.raises(errors.UserError, match=r"nothing: no run there"):
    trained_model.load(tmp_path / "nothing")


# Files.


def variables(norm, **kwargs):
  params, stats = trees.fresh(norm, seed=3, **kwargs)
  params["head"]["kernel"] *= 0.1  # All classes have some probability.
  if norm == "BN":  # Variances are positive.
    stats = jax.tree.map(lambda x: 1 + np.abs(x), stats)
  return params, stats


@pytest.mark.parametrize("norm", ["LN", "BN", "GN", "Rescale"])
def test_a_file_of_each_norm_loads(norm, tmp_path):
  params, stats = variables(norm, image_size=12)
  npz.save(tmp_path / "some.npz", params, stats)
  said = {"norm": "GN"} if norm == "GN" else {}
  model = npz_model.load(tmp_path / "some.npz", **said)
  assert model.name == "some" and model.image_size == 12
  assert model.class_names == ("0", "1", "2")
  assert model.model.config.norm == norm
  expected = models.create(
    "ViT-B_16", num_classes=3, norm=norm, image_size=12, **trees.TINY
  ).apply({"params": params, "batch_stats": stats}, model.inputs(IMAGES))
  expected = np.asarray(jax.nn.softmax(expected))
  assert np.ptp(expected, axis=0).min() > 0.005  # Outputs depend on the image.
  np.testing.assert_allclose(model(IMAGES), expected, atol=1e-5)


@pytest.mark.parametrize(
  "norm, options",
  [
    *((norm, {}) for norm in norms.NORMS),
    ("Cal", {"residual": "rescalenet", "sigma_reparam": True}),
    ("Rescale", {"residual": "rescalenet", "qk_norm": True}),
    ("LN", {"residual": "rescalevit", "sigma_reparam": True}),
    ("Identity", {"residual": "skipinit"}),
    ("BN", {"residual": "layerscale", "sigma_reparam": True}),
  ],
)
def test_options_are_inferred_from_a_file(norm, options, tmp_path):
  params, stats = trees.fresh(norm, seed=3, **options)
  npz.save(tmp_path / "a.npz", params, stats)
  model = npz_model.load(
    tmp_path / "a.npz", norm="GN" if norm == "GN" else None
  )
  want = models.create(
    "ViT-B_16", num_classes=3, image_size=8, norm=norm, **trees.TINY, **options
  )
  assert model.model == want
  trees.same(trees.flat(**model.variables), trees.flat(params, stats))


def test_a_model_can_be_folded_after_use(tmp_path):
  npz.save(tmp_path / "a.npz", *variables("BN"))
  model = npz_model.load(tmp_path / "a.npz")
  expected = model(IMAGES)
  np.testing.assert_allclose(model.fold()(IMAGES), expected, atol=1e-5)


def test_residual_c_and_pool_are_arguments(tmp_path):
  npz.save(tmp_path / "a.npz", *trees.fresh(residual="rescalenet"))
  model = npz_model.load(tmp_path / "a.npz", residual_c=3.0, pool="gap")
  assert (model.model.config.residual_c, model.model.config.pool) == (
    3.0,
    "gap",
  )


def test_gelu_variant_of_a_file(tmp_path):
  npz.save(tmp_path / "a.npz", *variables("LN"))
  found = [
    npz_model.load(tmp_path / "a.npz", gelu=gelu) for gelu in ("erf", "tanh")
  ]
  assert [model.model.config.gelu for model in found] == ["erf", "tanh"]


def test_a_file_with_pre_logits_loads(tmp_path):
  params, stats = variables("LN", representation_size=6)
  npz.save(tmp_path / "a.npz", params, stats)
  model = npz_model.load(tmp_path / "a.npz")
  assert model.model.config.representation_size == 6
  trees.same(trees.flat(**model.variables), trees.flat(params, stats))
  assert model(IMAGES).shape == (7, 3)


def test_a_file_without_a_head_cannot_classify(tmp_path):
  arrays = trees.arrays("LN")
  kept = {k: v for k, v in arrays.items() if k not in trees.HEAD}
  model = npz_model.load(trees.write(tmp_path, kept))
  assert model.class_names == ()
  logits = model.model.apply(model.variables, model.inputs(IMAGES))
  assert np.isfinite(logits).all()
  with pytest.raises(errors.UserError, match="file: has no head"):
    model(IMAGES)


def without(arrays, word):
  return {k: v for k, v in arrays.items() if word not in k}


@pytest.mark.parametrize(
  "arrays, words, kwargs",
  [
    ({"a": np.zeros(3)}, "not a ViT checkpoint", {}),
    ({"embedding/kernel": np.zeros((4, 4, 3, 8))}, "complete Vision Tr", {}),
    (without(trees.arrays(), "pos_embedding"), "complete Vision Tr", {}),
    (without(trees.arrays(), "encoderblock"), "complete Vision Tr", {}),
    (without(trees.arrays(), "_0/LayerNorm_0/bias"), "is missing", {}),
    (without(trees.arrays(), "head/bias"), "head/", {}),
    (without(trees.arrays("Rescale"), "init_mean"), "init_mean", {}),
    (without(trees.arrays("Rescale"), "batch_stats"), "lacks batch_st", {}),
    (trees.arrays("Rescale"), "Rescale, not GN", {"norm": "GN"}),
    (trees.arrays("LN"), "LN, not BN", {"norm": "BN"}),
    (trees.arrays("BN"), "BN, not LN", {"norm": "LN"}),
    (trees.arrays("LN"), "unknown 'gn'; did you mean GN", {"norm": "gn"}),
    (trees.arrays("LN"), "model.gelu: unknown", {"gelu": "relu"}),
    (trees.arrays("LN"), "leave c out", {"residual_c": 3.0}),
    (trees.arrays("LN"), "groups are of GN", {"gn_groups": 2}),
    (
      trees.arrays(residual="skipinit"),
      "the model has no array",
      {"residual": "convex"},
    ),
    (
      trees.arrays("LN", hidden_size=6, num_heads=2),
      "6 is not divisible by the 4 groups",
      {"norm": "GN"},
    ),
  ],
)
def test_files_of_other_models_are_errors(arrays, words, kwargs, tmp_path):
  path = trees.write(tmp_path, arrays)
  with pytest.raises(errors.UserError) as caught:
    npz_model.load(path, **kwargs)
  message = str(caught.value)
  assert words in message and str(path) in message and "\n" not in message


def test_an_invalid_file_is_an_error(tmp_path):
  (tmp_path / "a.npz").write_text("hello")
  with pytest.raises(errors.UserError, match=r"a\.npz: not a readable"):
    npz_model.load(tmp_path / "a.npz")


def test_an_unknown_checkpoint_is_an_error(tiny_run):
  with pytest.raises(errors.UserError, match="'newest'.* best, latest"):
    trained_model.load(tiny_run, "newest")


@pytest.mark.parametrize("names", ["abcdefghij", None, {}])
def test_class_names_are_a_list(copied, names):
  (copied / "class_names.json").write_text(json.dumps(names))
  with pytest.raises(
    errors.UserError, match=r"class_names\.json: is not a list"
  ):
    trained_model.load(copied)
