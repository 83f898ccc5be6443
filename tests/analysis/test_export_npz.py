"""The command that exports a run's weights as an `.npz`."""

import pathlib
import shutil

import fake_runs
import numpy as np
import pytest
import trees

from rescalevit_jax import errors
from rescalevit_jax import models
from rescalevit_jax.analysis import export_npz
from rescalevit_jax.analysis import trained_model
from rescalevit_jax.pretrained import convert
from rescalevit_jax.pretrained import load
from rescalevit_jax.pretrained import param_keys
from rescalevit_jax.runs import checkpoint


@pytest.fixture
def export(tmp_path, monkeypatch):
  """Return a function that exports a run with two different checkpoints."""
  script = export_npz

  def load_variables(workdir, which):
    if pathlib.Path(workdir) != tmp_path / "run":
      raise errors.UserError(f"{workdir}: no checkpoint")
    return (*trees.fresh("BN", seed=["best", "latest"].index(which)), 7)

  monkeypatch.setattr(checkpoint, "load_variables", load_variables)

  fake_runs.write(tmp_path / "run", {"model.norm": "BN"})

  def export(*flags, workdir="run"):
    return script.main(
      [f"--workdir={tmp_path / workdir}", f"--output={tmp_path / 'a.npz'}"]
      + list(flags)
    )

  return export


@pytest.mark.parametrize("which", ["best", "latest"])
def test_export(which, export, tmp_path, capsys):
  flags = () if which == "best" else ("--checkpoint=latest",)
  assert export(*flags) == 0
  params, stats, _ = load.load(tmp_path / "a.npz", *trees.fresh("BN", seed=5))
  trees.same(
    trees.flat(params, stats), trees.arrays("BN", seed=which == "latest")
  )
  out = capsys.readouterr().out
  assert which in out and "7" in out and "a.npz" in out


@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_a_norm_that_does_not_fold_is_an_error(norm, export, tmp_path, capsys):
  shutil.rmtree(tmp_path / "run")
  fake_runs.write(tmp_path / "run", {"model.norm": norm})
  assert export("--fold") == 1
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and f"{norm} does not fold" in error
  assert not (tmp_path / "a.npz").exists()


def test_fold(default_run, test_digits, tmp_path, capsys):
  path = tmp_path / "a.npz"
  flags = [f"--workdir={default_run}", f"--output={path}", "--fold"]
  assert export_npz.main(flags) == 0
  assert "norm folded" in capsys.readouterr().out
  folded, run = trained_model.load_npz(path), trained_model.load(default_run)
  norms = [model.model.config.norm for model in (run, folded)]
  assert norms == ["Rescale", "Identity"]
  images = list(test_digits.images[:20])
  np.testing.assert_allclose(folded(images), run(images), atol=1e-5)


@pytest.mark.parametrize(
  "keys, words",
  [
    ({}, None),
    ({"norm": "GN", "gelu": "tanh"}, "GN,tanh"),
    ({"residual": "rescalenet", "residual_c": 3.0, "pool": "gap"}, "gap,c=3.0"),
    ({"residual_c": 3.0}, None),
  ],
)
def test_options_missing_in_the_arrays_are_printed(
  keys, words, export, tmp_path, capsys
):
  shutil.rmtree(tmp_path / "run")
  keys = {f"model.{key}": value for key, value in keys.items()}
  fake_runs.write(tmp_path / "run", keys)
  assert export() == 0
  *_, last = capsys.readouterr().out.splitlines()
  if words:
    assert last.endswith(f"{tmp_path / 'a.npz'}:{words}")
  else:
    assert "the best weights" in last


def test_export_keeps_an_existing_file(export, tmp_path, capsys):
  path = tmp_path / "a.npz"
  path.write_bytes(b"precious")
  assert export() == 1
  assert path.read_bytes() == b"precious"
  error = capsys.readouterr().err
  assert error.count("\n") == 1
  assert "--overwrite" in error and str(path) in error
  assert export("--overwrite") == 0
  assert path.read_bytes() != b"precious"


def test_a_missing_run_is_an_error(export, tmp_path, capsys):
  assert export(workdir="none") == 1
  captured = capsys.readouterr()
  assert captured.err.count("\n") == 1 and "no checkpoint" in captured.err
  assert not captured.out and not (tmp_path / "a.npz").exists()


SIZES = dict(patch_size=4, hidden_size=48, mlp_dim=96, num_heads=3)


@pytest.fixture
def ln_run(tmp_path, monkeypatch):
  """The folder of a run with LN whose weights are random; its parameters."""
  params, _ = trees.fresh(num_classes=5, image_size=16, num_layers=2, **SIZES)
  monkeypatch.setattr(
    checkpoint, "load_variables", lambda workdir, which: (params, {}, 7)
  )
  return fake_runs.write(tmp_path / "ln", {"model.norm": "LN"}), params


def test_timm_loads_the_weights_and_gives_the_same_logits(ln_run):
  workdir, params = ln_run
  torch = pytest.importorskip("torch", reason="needs the extra timm")
  timm_vit = pytest.importorskip(
    "timm.models.vision_transformer", reason="needs the extra timm"
  )
  safetensors = pytest.importorskip("safetensors.torch")
  assert export_npz.main([f"--workdir={workdir}", "--family=timm"]) == 0
  module = timm_vit.VisionTransformer(
    img_size=16,
    patch_size=4,
    embed_dim=48,
    depth=2,
    num_heads=3,
    mlp_ratio=2,
    num_classes=5,
  ).eval()
  weights = safetensors.load_file(workdir / "weights.safetensors")
  module.load_state_dict(weights, strict=True)
  model = models.create(
    "ViT-B_16", num_classes=5, image_size=16, num_layers=2, **SIZES
  )
  x = np.random.default_rng(0).uniform(-1, 1, (3, 16, 16, 3))
  expected = model.apply({"params": params}, x.astype(np.float32))
  with torch.no_grad():
    x = torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32))
    np.testing.assert_allclose(module(x).numpy(), expected, atol=1e-4)


def test_the_files_of_families_convert_back(ln_run, tmp_path):
  workdir, params = ln_run
  pytest.importorskip("safetensors")
  for family in ("timm", "huggingface"):
    output = tmp_path / f"{family}.safetensors"
    flags = [f"--workdir={workdir}", f"--family={family}"]
    assert export_npz.main([*flags, f"--output={output}"]) == 0
    half = ((0.5,) * 3, (0.5,) * 3)
    found = convert.convert(output, heads=3, normalization=half)
    for key, x in param_keys.flatten(params, {}).items():
      np.testing.assert_allclose(found[key], x, rtol=1e-6, err_msg=key)


def test_families_have_no_other_norms(export, tmp_path, capsys):
  pytest.importorskip("safetensors")
  assert export("--family=timm") == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith("error: ")
  assert not (tmp_path / "a.npz").exists()
