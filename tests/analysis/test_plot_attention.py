"""The command that draws and measures attention."""

import csv
import shutil

import fake_runs
from matplotlib import figure
import norm_sets
import numpy as np
from PIL import Image
import pytest
import tiny_model

from rescalevit_jax import errors
from rescalevit_jax.analysis import attention_maps
from rescalevit_jax.analysis import attention_plots
from rescalevit_jax.analysis import npz_model
from rescalevit_jax.analysis import plot_attention
from rescalevit_jax.analysis import subjects
from rescalevit_jax.analysis import trained_model
from rescalevit_jax.data import dataset
from rescalevit_jax.pretrained import npz


def test_runs_and_files_are_drawn_and_measured(
  tiny_run, digits_dir, tmp_path, capsys
):
  model = tiny_model.create("GN")
  path = tmp_path / "gn.npz"
  npz.save(path, **model.variables)
  code = plot_attention.main(
    [
      f"--workdir={tiny_run}",
      f"--npz={path}:GN",
      "--index=3",
      f"--output={tmp_path / 'out'}",
    ]
  )
  assert code == 0
  for kind in attention_plots.KINDS:
    for suffix in ("png", "svg"):
      assert (tmp_path / "out" / f"{kind}.{suffix}").stat().st_size > 2000
  with open(tmp_path / "out" / "attention.csv", newline="") as f:
    rows = list(csv.DictReader(f))
  assert [(r["norm"], r["block"]) for r in rows] == [
    ("Rescale", "0"),
    ("Rescale", "1"),
    ("GN", "0"),
    ("GN", "1"),
    ("GN", "2"),
  ]
  images = dataset.load("digits", str(digits_dir)).test.images
  assert {r["images"] for r in rows} == {str(len(images))}
  expected = attention_maps.statistics(trained_model.load(tiny_run), images)
  for column, values in (
    ("entropy_nats", expected.entropy),
    ("diagonal_share", expected.diagonal),
    ("hoyer_sparsity", expected.sparsity),
  ):
    found = [float(row[column]) for row in rows[:2]]
    assert found == pytest.approx(values)
  assert "entropy" in capsys.readouterr().out


def test_an_image_file_may_have_any_size(tiny_run, tmp_path):
  picture = np.random.default_rng(0).integers(0, 256, (50, 30, 3), np.uint8)
  Image.fromarray(picture).save(tmp_path / "a.png")
  arguments = [f"--workdir={tiny_run}", "--no_statistics", "--kind=rollout"]
  code = plot_attention.main(
    [*arguments, f"--image={tmp_path / 'a.png'}", f"--output={tmp_path}"]
  )
  assert code == 0
  assert sorted(p.name for p in tmp_path.iterdir()) == [
    "a.png",
    "rollout.png",
    "rollout.svg",
  ]


def test_files_of_all_norms_are_drawn(digits_dir, tmp_path):
  names = norm_sets.DIFFERENT
  for norm in names:
    variables = tiny_model.create(norm).variables
    npz.save(tmp_path / f"{norm}.npz", **variables)
  words = {"GN": ":GN", "Rescale": ":tanh"}
  flags = [
    f"--npz={tmp_path}/{n}.npz{words.get(n, '')}" for n in norm_sets.DIFFERENT
  ]
  flags += ["--dataset=digits", f"--tfds_data_dir={digits_dir}"]
  assert plot_attention.main([*flags, "--kind=rollout"]) == 0
  with open(tmp_path / "attention" / "attention.csv", newline="") as f:
    rows = list(csv.DictReader(f))
  found = list(dict.fromkeys((r["model"], r["norm"]) for r in rows))
  assert found == [(norm, norm) for norm in names]
  images = dataset.load("digits", str(digits_dir)).test.images
  tanh = npz_model.load(tmp_path / "Rescale.npz", gelu="tanh")
  expected = attention_maps.statistics(tanh, images).entropy
  found = [float(r["entropy_nats"]) for r in rows if r["norm"] == "Rescale"]
  np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_files_without_a_dataset_are_only_drawn(tmp_path, capsys):
  npz.save(tmp_path / "a.npz", **tiny_model.create().variables)
  Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
  flags = [f"--npz={tmp_path / 'a.npz'}", f"--image={tmp_path / 'a.png'}"]
  assert plot_attention.main([*flags, "--kind=heads"]) == 0
  names = sorted(p.name for p in (tmp_path / "attention").iterdir())
  assert names == ["heads.png", "heads.svg"]
  assert "no statistics of files without --dataset" in capsys.readouterr().err


def test_one_file_with_different_options(digits_dir, tmp_path):
  """File names may contain a colon."""
  path = tmp_path / "a:b.npz"
  npz.save(path, **tiny_model.create().variables)
  flags = [f"--npz={path}", f"--npz={path}:tanh", f"--npz={path}:LN,erf"]
  flags += ["--dataset=digits", f"--tfds_data_dir={digits_dir}"]
  assert plot_attention.main([*flags, "--kind=rollout"]) == 0
  with open(tmp_path / "attention" / "attention.csv", newline="") as f:
    rows = list(csv.DictReader(f))
  found = list(dict.fromkeys((r["model"], r["path"], r["gelu"]) for r in rows))
  assert found == [
    (f"{path}", f"{path}", "erf"),
    (f"{path}:tanh", f"{path}", "tanh"),
    (f"{path}:LN,erf", f"{path}", "erf"),
  ]


def test_options_of_a_file_are_parsed(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "a.npz").touch()
  said = []

  def load(path, **kwargs):
    said.append((path, kwargs))
    raise errors.UserError("enough")

  monkeypatch.setattr(npz_model, "load", load)
  plot_attention.main(["--npz=a.npz:Cal,gap,c=3,tanh", "--image=a.png"])
  words = {"norm": "Cal", "gelu": "tanh", "pool": "gap", "residual_c": 3.0}
  assert said == [("a.npz", words)]


@pytest.mark.parametrize(
  "runs, npz",
  [(["nowhere"], []), ([], ["nowhere.npz"]), ([], ["a:LN,nowhere"])],
)
def test_a_missing_run_is_reported_before_models_are_loaded(
  runs, npz, tiny_run, monkeypatch
):
  monkeypatch.delattr(trained_model, "load")
  with pytest.raises(errors.UserError, match="nowhere"):
    subjects.load([str(tiny_run), *runs], npz)


def test_runs_with_equal_names_are_distinguished(tiny_run, tmp_path):
  copy = tmp_path / "tiny_run"
  shutil.copytree(tiny_run, copy)
  flags = [f"--workdir={tiny_run}", f"--workdir={copy}", "--kind=rollout"]
  assert plot_attention.main([*flags, f"--output={tmp_path / 'o'}"]) == 0
  with open(tmp_path / "o" / "attention.csv", newline="") as f:
    rows = list(csv.DictReader(f))
  names = list(dict.fromkeys(r["model"] for r in rows))
  assert names == [str(tiny_run), str(copy)]
  assert {r["dataset"] for r in rows} == {"digits"}


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    ([], "give --workdir or --npz"),
    (["--workdir={run}", "--index=360"], "0 to 359"),
    (["--workdir={run}", "--index=-1"], "0 to 359"),
    (["--workdir={run}", "--block=2"], "0 to 1"),
    (["--workdir={run}", "--batch=0"], "--batch"),
    (["--workdir={run}", "--image=nothing.png"], "nothing.png"),
    (["--workdir=nowhere"], "no run there"),
    (["--npz=nowhere.npz"], "nowhere.npz"),
    (["--npz=a.npz", "--checkpoint=latest"], "add --workdir"),
    (["--npz=no:where.npz"], "no:where.npz: no such file"),
    (["--npz=nowhere.npz:InstanceNorm"], "'InstanceNorm' in"),
    (["--npz=nowhere.npz:LN,GN"], "'GN' in nowhere.npz:LN,GN"),
    (["--npz=nowhere.npz:erf,tanh"], "'tanh'"),
    (["--npz=nowhere.npz:c=-1"], "'c=-1'"),
    (["--npz=nowhere.npz:c=1,c=2"], "'c=2'"),
  ],
)
def test_errors_are_one_line(flags, words, tiny_run, tmp_path, capsys):
  flags = [flag.format(run=tiny_run) for flag in flags]
  assert plot_attention.main([*flags, f"--output={tmp_path / 'out'}"]) == 1
  (line,) = [
    x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")
  ]
  assert words in line
  assert not (tmp_path / "out").exists()


def test_each_run_sees_the_test_image_through_its_own_resizing(
  tiny_config, tmp_path, monkeypatch
):
  shown = []

  def record(kind, models, images, block):
    shown.append([image.shape for image in images])
    return figure.Figure()

  monkeypatch.setattr(attention_plots, "draw", record)
  command = ["--index=3", "--kind=tokens", "--no_statistics"]
  for size in (None, 12):
    tiny_config.data.image_size = size
    workdir = tmp_path / f"run{size}"
    fake_runs.write_with_checkpoint(workdir, tiny_config)
    command.append(f"--workdir={workdir}")
  assert plot_attention.main([*command, f"--output={tmp_path}"]) == 0
  assert shown == [[(8, 8, 3), (12, 12, 3)]]
