"""Plots of attention and their panels."""

import itertools

import norm_sets
import numpy as np
from PIL import Image
import pytest
import tiny_model

from rescalevit_jax import errors
from rescalevit_jax.analysis import attention_maps
from rescalevit_jax.analysis import attention_plots
from rescalevit_jax.analysis import plots
from rescalevit_jax.data import image_files
from rescalevit_jax.training import experiment


@pytest.fixture(scope="module")
def image():
  return np.random.default_rng(1).integers(0, 256, (8, 8, 3), np.uint8)


def axes(figure):
  """Return the panels that are not empty."""
  return [ax for ax in figure.axes if ax.images]


def maps_of(model, image):
  return np.asarray(
    attention_maps.collect_probabilities(
      model.model, model.variables, model.inputs([image])
    )
  )[:, 0]


def test_tokens_plot_shows_head_0_of_three_blocks(image):
  model = tiny_model.create(num_layers=8)
  figure = attention_plots.draw("tokens", [model], [image])
  panels = axes(figure)
  assert [ax.get_title() for ax in panels] == ["block 0", "block 3", "block 6"]
  for ax, block in zip(panels, (0, 3, 6), strict=True):
    np.testing.assert_array_equal(
      ax.images[0].get_array(), maps_of(model, image)[block, 0]
    )


@pytest.mark.parametrize("kind", attention_plots.KINDS)
def test_pictures_are_the_same_in_every_run(kind, image):
  """The solver of the layout adds up in the order of memory addresses."""
  models = [tiny_model.create(), tiny_model.create()]
  pictures, garbage = set(), []
  for i in range(4):
    figure = attention_plots.draw(kind, models, [image] * len(models))
    pictures.add(plots.render(figure, "svg"))
    garbage += [bytearray(100 * i + j) for j in range(1000)]
  assert len(pictures) == 1


def test_heads_plot_shows_every_head_of_a_block(image):
  model = tiny_model.create()
  panels = axes(attention_plots.draw("heads", [model], [image], block=2))
  assert [ax.get_title() for ax in panels] == ["head 0", "head 1"]
  for head, ax in enumerate(panels):
    np.testing.assert_array_equal(
      ax.images[0].get_array(), maps_of(model, image)[2, head]
    )


def test_class_token_attention_is_drawn_over_the_image(image):
  model = tiny_model.create()
  panels = axes(attention_plots.draw("class_token", [model], [image]))
  assert [ax.get_title() for ax in panels] == [
    "image",
    "block 0",
    "block 1",
    "block 2",
  ]
  np.testing.assert_allclose(
    panels[0].images[0].get_array(), image / 255, atol=1e-6
  )
  for block, ax in enumerate(panels[1:]):
    gray, overlay = ax.images
    assert gray.get_extent() == overlay.get_extent()
    expected = maps_of(model, image)[block].mean(0)[0, 1:].reshape(2, 2) * 5
    np.testing.assert_allclose(overlay.get_array(), expected, rtol=1e-6)


def test_arrays_of_a_split_are_not_cropped_again(image):
  model = tiny_model.create(num_layers=1)
  (shown,) = drawn_images(model, image)
  model.resize = image_files.Resize(8, "crop", 0.5)
  (split,) = drawn_images(model, image)
  (opened,) = drawn_images(model, Image.fromarray(image))
  np.testing.assert_array_equal(split, shown)
  assert np.abs(opened - shown).max() > 0.1


def drawn_images(model, image):
  figure = attention_plots.draw("rollout", [model], [image])
  return [ax.images[0].get_array() for ax in axes(figure)[:1]]


def test_rollout_starts_at_the_class_token(image):
  model = tiny_model.create()
  panels = axes(attention_plots.draw("rollout", [model], [image]))
  share = attention_maps.rollout(maps_of(model, image))[0, 1:].reshape(2, 2)
  np.testing.assert_allclose(
    panels[1].images[1].get_array(), share / share.mean(), rtol=1e-6
  )


@pytest.mark.parametrize("kind", attention_plots.KINDS)
def test_all_norms_share_one_scale(kind, image):
  models = [tiny_model.create(norm) for norm in norm_sets.DIFFERENT]
  figure = attention_plots.draw(kind, models, [image] * len(models))
  maps = [i for ax in axes(figure) for i in ax.images if i.norm.vmax != 1]
  assert len(maps) >= len(models)
  assert len({(i.norm.vmin, i.norm.vmax) for i in maps}) == 1
  titles = [f.get_suptitle() for f in figure.subfigs[0].subfigs]
  titles = list(filter(None, titles))  # The last row may have empty panels.
  assert titles == [f"{norm}\ntiny" for norm in norm_sets.DIFFERENT]


@pytest.mark.parametrize(
  "name",
  [
    "digits-ViT-XS_2-Rescale-scratch-seed0-base_lr=0.1-cost$^$",
    "W" * 70,
    "a\udcff",
  ],
)
def test_long_and_odd_names_fit(name, image):
  models = [tiny_model.create(norm) for norm in ("LN", "BN", "GN", "Rescale")]
  for model in models:
    model.name = name
  figure = attention_plots.draw("rollout", models, [image] * len(models))
  plots.pixels(figure)
  renderer = figure.canvas.get_renderer()
  boxes = [
    part._suptitle.get_window_extent(renderer)
    for part in figure.subfigs[0].subfigs
  ]
  for left, right in itertools.pairwise(boxes):
    assert left.x1 < right.x0
  assert boxes[0].x0 > 0


def test_all_kinds_are_drawn_during_training(tiny_config):
  parts = experiment.create(tiny_config)
  state = parts.init_state()
  variables = {"params": state.params, "batch_stats": state.batch_stats}
  pictures = attention_plots.draw_during_training(1, parts, variables)
  assert set(pictures) == {f"attention/{k}" for k in attention_plots.KINDS}
  for picture in pictures.values():
    assert picture.dtype == np.uint8 and picture.shape[-1] == 3
    assert picture.std() > 10


def test_an_unknown_block_is_an_error(image):
  with pytest.raises(errors.UserError, match="no block 3.* 0 to 2"):
    attention_plots.draw("heads", [tiny_model.create()], [image], block=3)
