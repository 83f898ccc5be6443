"""Loading agrees with the code of Google and RescaleViT.

Every check runs on the full and on the reduced reference numbers.
"""

import functools
import re

import numpy as np
import parity
import pytest
import trees

from rescalevit_jax import models
from rescalevit_jax.pretrained import load
from rescalevit_jax.pretrained import positions


@pytest.fixture(params=parity.SOURCES)
def source(request):
  return request.param


def grouped(keys):
  return {re.sub(r"block_\d+", "block_*", k) for k in keys}


def close(got, expected, atol=1e-5):
  np.testing.assert_allclose(got, expected, atol=atol, rtol=0)


@pytest.mark.parametrize("grid", ["4x4", "12x12", "14x14", "5x5"])
def test_resized_position_embedding_equals_googles(grid, source):
  stored = parity.arrays("posembed_resize.npz", source)
  google = stored[f"google/{grid}"]
  got = positions.resize(stored["in"], google.shape[1])
  close(got, google, atol=1e-6)


def old_numbering(key):
  for old, new in trees.NEW_NUMBERING.items():
    key = key.replace(new, old)
  return key


@pytest.mark.parametrize(
  "file, note, sizes",
  [
    ("google.npz", "10->5, image 32->48", dict(image_size=48)),
    ("google_prelogits.npz", "50->5", dict(image_size=32)),
    (
      "google_prelogits.npz",
      "50->5",
      dict(image_size=32, representation_size=32),
    ),
  ],
)
def test_report_agrees_with_googles_loader(file, note, sizes, source):
  log = parity.table("google_load.json", source)
  size = sizes.get("representation_size")
  google = log[f"{file}, representation_size={size}, num_classes {note}"]
  target = trees.fresh(num_classes=5, seed=1, **trees.SMALL | sizes)
  params, _, report = load.load(parity.path(file, source), *target)
  keys = {
    kind: {old_numbering(k) for k in google[kind]}
    for kind in ("kept_unchanged", "replaced_by_init", "resized", "dropped")
  }
  assert set(report.loaded) == keys["kept_unchanged"]
  assert set(report.reinitialized) == keys["replaced_by_init"]
  assert set(report.resized) == keys["resized"]
  assert set(report.dropped) == keys["dropped"]
  assert not report.initial
  got = trees.flat(params, {})
  saved = parity.arrays(file, source)
  trees.same(
    {k: got[k] for k in report.loaded}, {k: saved[k] for k in report.loaded}
  )


def test_googles_linen_names_load(tmp_path, source):
  log = parity.table("google_load.json", source)
  rename = log["renaming done by checkpoint.load (pre-linen -> linen)"]
  saved = parity.arrays("google.npz", source)

  def new(key):
    index = re.search(r"block_(\d+)", key)
    pattern = re.sub(r"block_\d+", "block_*", key)
    pattern = rename.get(pattern, pattern)
    return pattern.replace("*", index[1]) if index else pattern

  renamed = {new(k): v for k, v in saved.items()}
  assert sum(k not in saved for k in renamed) == 4 * 14
  target = trees.fresh(num_classes=10, image_size=32, seed=1, **trees.SMALL)
  params, _, _ = load.load(trees.write(tmp_path, renamed), *target)
  trees.same(trees.flat(params, {}), saved)


@pytest.mark.parametrize("norm", ["LN", "BN", "GN", "Rescale"])
def test_all_weights_and_statistics_of_rescalevit_load(norm, tmp_path, source):
  saved = {
    k: v
    for k, v in parity.arrays(f"{norm}.npz", source).items()
    if not k.startswith("ref/")
  }
  target = trees.fresh(norm, num_classes=10, image_size=32, **trees.SMALL)
  *loaded, report = load.load(trees.write(tmp_path, saved), *target)
  trees.same(trees.flat(*loaded), saved)
  assert report == load.Report(loaded=report.loaded)


@pytest.mark.parametrize("norm", ["LN", "BN", "GN", "Rescale"])
def test_all_weights_that_rescalevit_loads_are_loaded(norm, source):
  original = parity.table("torch_load_from.json", source)[norm]
  target = trees.fresh(
    norm, num_classes=10, image_size=32, seed=1, **trees.SMALL
  )
  *_, report = load.load(
    parity.path("google.npz", source), *target, reinit_head=True
  )
  loaded, initial = grouped(report.loaded), grouped(report.initial)
  assert grouped(report.reinitialized) == set(original["zeroed"])
  assert loaded >= set(original["loaded"])
  # The original silently leaves more at the initial value.
  assert loaded | initial == (
    set(original["loaded"]) | set(original["left_at_init"])
  )
  assert initial == {
    k for k in original["left_at_init"] if re.search("Rescale|batch_stats", k)
  }
  if norm == "LN":
    assert len(report.loaded) == original["n_loaded"]


def outputs(
  file, source, images, num_classes, head=None, gelu="tanh", **settings
):
  """Load a file like a run; return features, head inputs, logits."""
  settings = dict(
    trees.SMALL,
    num_classes=num_classes,
    image_size=images.shape[1],
    **settings,
  )
  model = models.create("ViT-B_16", gelu=gelu, **settings)
  params, _, _ = load.load(parity.path(file, source), *trees.fresh(**settings))
  if head is not None:
    assert not params["head"]["kernel"].any()
    params["head"] = dict(zip(("kernel", "bias"), head, strict=True))
  logits, state = model.apply(
    {"params": params},
    images,
    capture_intermediates=lambda m, _: m.name in ("Transformer", "pre_logits"),
    mutable=["intermediates"],
  )
  found = state["intermediates"]
  features = inputs = found["Transformer"]["__call__"][0][:, 0]
  if "pre_logits" in found:
    inputs = np.tanh(found["pre_logits"]["__call__"][0])
  return features, inputs, logits


@pytest.mark.parametrize(
  "gelu, ref", [("tanh", "google"), ("erf", "google_erf")]
)
def test_outputs_equal_the_reference(gelu, ref, source):
  stored = parity.arrays("google_ref.npz", source)
  probe = stored["probe_head_kernel"], stored["probe_head_bias"]
  run = functools.partial(outputs, "google.npz", source, gelu=gelu)
  features, _, logits = run(stored["images"], 10)
  close(features, stored[f"{ref}/features"])
  close(logits, stored[f"{ref}/logits"])
  features, _, logits = run(stored["images_resized"], 5, probe)
  close(features, stored[f"{ref}/resized_features"])
  close(logits, stored[f"{ref}/resized_probe_logits"])


def test_outputs_for_larger_images_equal_the_reference(source):
  target = trees.fresh(num_classes=5, image_size=48, **trees.SMALL)
  params, _, _ = load.load(parity.path("google.npz", source), *target)
  close(
    params["Transformer"]["posembed_input"]["pos_embedding"],
    parity.arrays("google_ref.npz", source)["google/resized_posemb"],
    atol=1e-6,
  )


@pytest.mark.parametrize(
  "gelu, ref", [("tanh", "google"), ("erf", "google_erf")]
)
def test_outputs_with_pre_logits_equal_the_reference(gelu, ref, source):
  stored = parity.arrays("google_prelogits_ref.npz", source)
  probe = stored["probe_head_kernel"], stored["probe_head_bias"]
  run = functools.partial(
    outputs, "google_prelogits.npz", source, stored["images"], gelu=gelu
  )
  features, inputs, logits = run(50, representation_size=32)
  close(features, stored[f"{ref}/features"])
  close(inputs, stored[f"{ref}/pre_logits_out"])
  close(logits, stored[f"{ref}/logits"])
  _, inputs, logits = run(5, probe, representation_size=32)
  close(inputs, stored[f"{ref}/keep_head_input"])
  close(logits, stored[f"{ref}/keep_probe_logits"])


@pytest.mark.parametrize(
  "gelu, ref", [("tanh", "google"), ("erf", "google_erf")]
)
def test_outputs_without_pre_logits_equal_the_reference(gelu, ref, source):
  stored = parity.arrays("google_prelogits_ref.npz", source)
  probe = stored["probe_head_kernel"], stored["probe_head_bias"]
  run = functools.partial(
    outputs, "google_prelogits.npz", source, stored["images"], gelu=gelu
  )
  _, inputs, logits = run(5, probe)
  close(inputs, stored[f"{ref}/drop_head_input"])
  close(logits, stored[f"{ref}/drop_probe_logits"])
  # With equal numbers of classes, the file's head on features that it was not
  # trained on would change logits by up to 4.5.
  _, inputs, logits = run(50)
  close(inputs, stored[f"{ref}/features"])
  assert not logits.any()
