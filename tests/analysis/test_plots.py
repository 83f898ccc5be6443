"""Curves, colors and files of plots."""

import pathlib

import numpy as np
import pytest

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.analysis import plots
from rescalevit_jax.analysis import reference_results
from rescalevit_jax.models import norms
from rescalevit_jax.runs import run_reader


def run(norm, accuracies, seed=0, **keys):
  config = config_lib.default()
  config.model.norm = norm
  config.seed = seed
  config.update(keys)
  metrics = []
  for i, accuracy in enumerate(accuracies, start=1):
    metrics += [
      {"step": i, "train/loss": 3.0 / i},
      {"step": i, "test/accuracy": accuracy, "test/loss": 2.0 / i},
    ]
  return run_reader.Run(pathlib.Path(f"{norm}-{seed}"), config, None, metrics)


def test_norms_have_distinct_colors():
  colors = {plots.norm_color(norm) for norm in norms.NORMS}
  assert len(colors) == len(norms.NORMS)


def test_curves_show_the_numbers():
  figure = plots.curves([run("LN", [0.1, 0.3, 0.2])])
  accuracy, loss = figure.axes
  (line,) = accuracy.lines
  np.testing.assert_allclose(line.get_ydata(), [10, 30, 20])
  np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3])
  test, train = loss.lines
  np.testing.assert_allclose(test.get_ydata(), [2, 1, 2 / 3])
  np.testing.assert_allclose(train.get_ydata(), [3, 1.5, 1])
  assert train.get_alpha() < 0.5


def test_seeds_share_a_color_and_a_legend_entry():
  figure = plots.curves(
    [run("Rescale", [0.1], 0), run("LN", [0.2]), run("Rescale", [0.3], 1)]
  )
  colors = [line.get_color() for line in figure.axes[0].lines]
  assert colors == [plots.norm_color(n) for n in ("LN", "Rescale", "Rescale")]
  (legend,) = figure.legends
  labels = [text.get_text() for text in legend.get_texts()]
  assert labels == ["LN", "Rescale, 2 runs"]
  assert figure.get_suptitle() == "ViT-B_16 on cifar10"


def test_differing_keys_determine_label_and_line_style():
  figure = plots.curves([run("LN", [0.1]), run("LN", [0.2], base_lr=0.1)])
  first, second = figure.axes[0].lines
  assert first.get_color() == second.get_color()
  assert first.get_linestyle() != second.get_linestyle()
  assert first.get_label() == "LN, base_lr=0.05"
  assert second.get_label() == "LN, base_lr=0.1"


def test_many_groups_of_a_norm_have_distinct_lines():
  rates = [0.01 * i for i in range(1, 9)]
  figure = plots.curves([run("LN", [0.1], base_lr=rate) for rate in rates])
  lines = figure.axes[0].lines
  styles = {str(line._dash_pattern) for line in lines}
  assert len(styles) == 8
  assert ":" not in {line.get_linestyle() for line in lines}


def test_files_with_equal_names_are_distinguished():
  paths = ("a/x.npz", "b/x.npz", None)
  figure = plots.curves([run("LN", [0.1], pretrained_path=p) for p in paths])
  labels = [line.get_label() for line in figure.axes[0].lines]
  assert labels == ["LN, from a/x.npz", "LN, from b/x.npz", "LN, from scratch"]


def test_formulas_in_names_are_escaped(tmp_path):
  paths = ("cost$^$.npz", "b.npz")
  figure = plots.curves([run("LN", [0.1], pretrained_path=p) for p in paths])
  plots.save(figure, tmp_path / "a.PNG")
  assert (tmp_path / "a.PNG").read_bytes().startswith(b"\x89PNG")


def test_the_published_curve_is_drawn_faintly():
  same = run("LN", [0.1], model_name="ViT-B_32")
  other = run("LN", [0.1], model_name="ViT-B_32", base_lr=0.1)
  ours, faint = plots.curves([same]).axes[0].lines
  key = ("cifar10", "ViT-B_32", "LN", False)
  expected = reference_results.curves()[key].accuracy
  np.testing.assert_allclose(faint.get_ydata(), 100 * np.array(expected))
  assert faint.get_color() == ours.get_color()
  assert faint.get_alpha() <= 0.5
  assert faint.get_label() == "LN, published"
  assert len(plots.curves([other]).axes[0].lines) == 1


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_equal_figures_yield_equal_bytes(tmp_path, suffix):
  for name in ("a", "b"):
    plots.save(plots.curves([run("LN", [0.1])]), tmp_path / f"{name}{suffix}")
  first, second = (tmp_path / f"{n}{suffix}" for n in ("a", "b"))
  assert first.read_bytes() == second.read_bytes()
  assert first.stat().st_size > 5000


def test_a_table_outlives_a_failed_picture(tmp_path):
  def fail():
    raise OverflowError

  with pytest.raises(OverflowError):
    plots.save_with_table(fail, [["a"], [1]], tmp_path / "new" / "a")
  assert (tmp_path / "new" / "a.csv").read_text() == "a\n1\n"


def test_svg_is_one_element():
  text = plots.svg(plots.curves([run("LN", [0.1])]))
  assert text.startswith("<svg") and text.rstrip().endswith("</svg>")


def test_other_suffixes_are_errors(tmp_path):
  with pytest.raises(errors.UserError, match=r"\.png or \.svg"):
    plots.save(plots.curves([run("LN", [0.1])]), tmp_path / "a.jpeg")
