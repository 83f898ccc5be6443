"""Exported models give equal logits in the libraries that load them."""

import importlib.util
import json
import math
import pathlib
import subprocess
import sys

import fake_runs
import jax
import numpy as np
import pytest
import trees

from rescalevit_jax import errors
from rescalevit_jax import export
from rescalevit_jax import models
from rescalevit_jax.analysis import npz_model
from rescalevit_jax.analysis import trained_model
from rescalevit_jax.pretrained import convert
from rescalevit_jax.pretrained import load
from rescalevit_jax.pretrained import npz
from rescalevit_jax.pretrained import param_keys
from rescalevit_jax.runs import checkpoint

IMAGES = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 3))
IMAGES = IMAGES.astype(np.float32)


@pytest.fixture
def write_run(tmp_path, monkeypatch):
  """Return a function that writes a run with two different checkpoints."""

  def load_variables(workdir, which):
    if pathlib.Path(workdir) != tmp_path / "run":
      raise errors.UserError(f"{workdir}: no checkpoint")
    options = {k: v for k, v in written.items() if k != "norm"}
    seed = ["best", "latest"].index(which)
    return (*trees.fresh(written["norm"], seed=seed, **options), 7)

  monkeypatch.setattr(checkpoint, "load_variables", load_variables)
  written = {}

  def write_run(**keys):
    written.update({"norm": "BN"} | keys)
    keys = {f"model.{k}": v for k, v in (trees.TINY | written).items()}
    return fake_runs.write(tmp_path / "run", {"image_size": 8, **keys})

  return write_run


@pytest.fixture
def call(tmp_path):
  """Return a function that exports the run to a.npz."""

  def call(*flags, workdir="run"):
    flags = [f"--output={tmp_path / 'a.npz'}", *flags]
    return export.main([f"--workdir={tmp_path / workdir}", *flags])

  return call


@pytest.mark.parametrize("which", ["best", "latest"])
def test_npz_has_the_requested_checkpoint(
  which, write_run, call, tmp_path, capsys
):
  write_run()
  flags = () if which == "best" else ("--checkpoint=latest",)
  assert call(*flags) == 0
  params, stats, _ = load.load(tmp_path / "a.npz", *trees.fresh("BN", seed=5))
  trees.same(
    trees.flat(params, stats), trees.arrays("BN", seed=which == "latest")
  )
  out = capsys.readouterr().out
  assert which in out and "7" in out and "a.npz" in out


def test_a_norm_that_does_not_fold_is_an_error(
  write_run, call, tmp_path, capsys
):
  write_run(norm="LN")
  assert call("--fold") == 1
  error = capsys.readouterr().err
  assert error.count("\n") == 1 and "LN does not fold" in error
  assert not (tmp_path / "a.npz").exists()


def test_folding_keeps_the_logits(tiny_run, test_digits, tmp_path, capsys):
  path = tmp_path / "a.npz"
  flags = [f"--workdir={tiny_run}", f"--output={path}", "--fold"]
  assert export.main(flags) == 0
  assert "norm folded" in capsys.readouterr().out
  folded, run = npz_model.load(path), trained_model.load(tiny_run)
  norms = [model.model.config.norm for model in (run, folded)]
  assert norms == ["Rescale", "Identity"]
  images = list(test_digits.images[:20])
  np.testing.assert_allclose(folded(images), run(images), atol=1e-5)


@pytest.mark.parametrize(
  "keys, words",
  [
    ({"norm": "LN"}, None),
    ({"norm": "GN", "hidden_size": 64, "gelu": "tanh"}, "GN,tanh"),
    ({"residual": "rescalenet", "residual_c": 3.0, "pool": "gap"}, "gap,c=3.0"),
    ({"logit_cap": 5.0}, "logit_cap=5.0"),
  ],
)
def test_options_not_stored_in_a_file_are_printed(
  keys, words, write_run, call, tmp_path, capsys
):
  write_run(**keys)
  assert call() == 0
  *_, last = capsys.readouterr().out.splitlines()
  if words:
    assert last.endswith(f"{tmp_path / 'a.npz'}:{words}")
  else:
    assert "the best weights" in last


def test_input_resizing_is_printed(write_run, call, capsys):
  workdir = write_run()
  config = json.loads((workdir / "config.json").read_text())
  config["data"] |= {"image_size": 9, "resize": "crop"}
  (workdir / "config.json").write_text(json.dumps(config))
  assert call() == 0
  assert "to 9 pixels (data.resize=crop)" in capsys.readouterr().out


def test_export_keeps_an_existing_file(write_run, call, tmp_path, capsys):
  write_run()
  path = tmp_path / "a.npz"
  path.write_bytes(b"precious")
  assert call() == 1
  assert path.read_bytes() == b"precious"
  error = capsys.readouterr().err
  assert error.count("\n") == 1
  assert "--overwrite" in error and str(path) in error
  assert call("--overwrite") == 0
  assert path.read_bytes() != b"precious"


@pytest.mark.parametrize(
  "flags, word",
  [
    (["--workdir=none"], "no run there"),
    (["--workdir=none", "--output=a.bin"], "--format"),
    (["--workdir=none", "--output=none/a.npz"], "folder that exists"),
    (["--npz=none.npz"], "add --output"),
    (["--npz=none.npz", "--output=a.npz", "--checkpoint=best"], "--workdir"),
  ],
)
def test_invalid_arguments_are_one_line_errors(
  flags, word, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  assert export.main(flags) == 1
  captured = capsys.readouterr()
  assert captured.err.count("\n") == 1 and word in captured.err
  assert not captured.out and not [*tmp_path.iterdir()]


@pytest.fixture
def bn_file(tmp_path):
  """Write an .npz of a model with BN; return its path and logits."""
  params, stats = trees.fresh("BN", seed=1)
  npz.save(tmp_path / "bn.npz", params, jax.tree.map(np.abs, stats))
  model = npz_model.load(tmp_path / "bn.npz")
  return tmp_path / "bn.npz", model.model.apply(model.variables, IMAGES)


def run_program(folder, program):
  """Run a program in a subprocess; return the words that it prints."""
  done = subprocess.run(
    [sys.executable, "-c", program],
    cwd=folder,
    check=True,
    capture_output=True,
    text=True,
  )
  return done.stdout.split()


def test_stablehlo_runs_without_this_package(bn_file, tmp_path):
  path, expected = bn_file
  for name, flags in (("plain", ()), ("folded", ("--fold",))):
    output = tmp_path / f"{name}.stablehlo"
    assert export.main([f"--npz={path}", f"--output={output}", *flags]) == 0
  np.save(tmp_path / "images.npy", IMAGES)
  program = """
import pathlib, sys
from jax import export
import numpy as np
images = np.load("images.npy")
for path in pathlib.Path().glob("*.stablehlo"):
  exported = export.deserialize(path.read_bytes())
  logits = exported.call(images), exported.call(images[:1])
  np.savez(path.stem, *logits)
assert not {"rescalevit_jax", "flax"} & sys.modules.keys()
print(*exported.platforms)
"""
  assert run_program(tmp_path, program) == ["cpu", "cuda"]
  for name in ("plain", "folded"):
    with np.load(tmp_path / f"{name}.npz") as found:
      for logits in found.values():
        wanted = expected[: len(logits)]
        np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)
      assert [len(x) for x in found.values()] == [3, 1]


@pytest.mark.slow  # Importing jax2onnx takes 10 s.
@pytest.mark.parametrize("flags", [(), ("--fold",)])
def test_onnx_runs_in_onnxruntime(bn_file, tmp_path, flags):
  pytest.importorskip("jax2onnx", reason="needs the extra onnx-export")
  runtime = pytest.importorskip("onnxruntime")
  path, expected = bn_file
  output = tmp_path / "a.onnx"
  assert export.main([f"--npz={path}", f"--output={output}", *flags]) == 0
  session = runtime.InferenceSession(output, providers=["CPUExecutionProvider"])
  for count in (1, 3):
    (found,) = session.run(["logits"], {"images": IMAGES[:count]})
    np.testing.assert_allclose(found, expected[:count], rtol=1e-4, atol=1e-4)


def test_only_unfolded_weights_are_exported_without_a_head(tmp_path, capsys):
  arrays = trees.arrays("BN")
  path = trees.write(
    tmp_path, {k: x for k, x in arrays.items() if not k.startswith("head/")}
  )
  output = tmp_path / "a.stablehlo"
  assert export.main([f"--npz={path}", f"--output={output}"]) == 1
  assert "has no head" in capsys.readouterr().err
  flags = [f"--npz={path}:BN", f"--output={tmp_path / 'a.npz'}"]
  assert export.main([*flags, "--fold"]) == 1
  assert "no head" in capsys.readouterr().err
  assert export.main(flags) == 0
  with np.load(path) as old, np.load(tmp_path / "a.npz") as new:
    trees.same(dict(new), dict(old))


SIZES = dict(patch_size=4, hidden_size=48, mlp_dim=96, num_heads=3)


@pytest.fixture
def ln_run(tmp_path, monkeypatch):
  """Return the folder and the random parameters of a run with LN."""
  sizes = SIZES | {"num_layers": 2}
  params, _ = trees.fresh(num_classes=5, image_size=16, **sizes)
  monkeypatch.setattr(
    checkpoint, "load_variables", lambda workdir, which: (params, {}, 7)
  )
  keys = {f"model.{key}": value for key, value in sizes.items()}
  keys |= {"model.norm": "LN", "image_size": 16}
  return fake_runs.write(tmp_path / "ln", keys), params


@pytest.mark.skipif(
  importlib.util.find_spec("timm") is None, reason="needs the extra timm"
)
def test_timm_gives_the_same_logits(ln_run):
  """Run timm in a subprocess because torch crashes beside TensorFlow."""
  workdir, params = ln_run
  assert export.main([f"--workdir={workdir}", "--format=timm"]) == 0
  x = np.random.default_rng(0).uniform(-1, 1, (3, 16, 16, 3))
  np.save(workdir / "images.npy", x.astype(np.float32))
  program = """
import numpy as np
import safetensors.torch
from timm.models import vision_transformer
import torch
module = vision_transformer.VisionTransformer(
  img_size=16, patch_size=4, embed_dim=48, depth=2, num_heads=3, mlp_ratio=2,
  num_classes=5,
).eval()
weights = safetensors.torch.load_file("weights.safetensors")
module.load_state_dict(weights, strict=True)
images = np.load("images.npy").transpose(0, 3, 1, 2)
with torch.no_grad():
  np.save("logits.npy", module(torch.from_numpy(images)).numpy())
"""
  run_program(workdir, program)
  model = models.create(
    "ViT-B_16", num_classes=5, image_size=16, num_layers=2, **SIZES
  )
  expected = model.apply({"params": params}, x.astype(np.float32))
  found = np.load(workdir / "logits.npy")
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_timm_and_huggingface_files_convert_back(ln_run, tmp_path):
  workdir, params = ln_run
  pytest.importorskip("safetensors")
  for family in ("timm", "huggingface"):
    output = tmp_path / f"{family}.safetensors"
    flags = [f"--workdir={workdir}", f"--format={family}"]
    assert export.main([*flags, f"--output={output}"]) == 0
    half = ((0.5,) * 3, (0.5,) * 3)
    found = convert.convert(output, normalization=half)
    for key, x in param_keys.flatten(params, {}).items():
      np.testing.assert_allclose(found[key], x, rtol=1e-6, err_msg=key)


def test_convert_takes_the_heads_of_timms_config(ln_run, tmp_path, capsys):
  workdir, params = ln_run
  pytest.importorskip("safetensors")
  output = tmp_path / "a.safetensors"
  flags = [f"--workdir={workdir}", "--format=timm", f"--output={output}"]
  assert export.main(flags) == 0
  config = {
    "num_attention_heads": None,
    "model_args": {"num_heads": 6},
    "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3},
  }
  (tmp_path / "config.json").write_text(json.dumps(config))
  assert convert.main([str(output)]) == 0
  out = capsys.readouterr().out
  assert "--config.model.num_heads=6" in out
  tokens = params["Transformer"]["posembed_input"]["pos_embedding"].shape[1]
  patch = params["embedding"]["kernel"].shape[0]
  size = math.isqrt(tokens - 1) * patch
  assert f"--config.image_size={size}" in out


def test_convert_warns_of_an_assumed_number_of_heads(tmp_path, caplog):
  caplog.set_level("WARNING", "rescalevit_jax")
  assert convert._default_heads(384, tmp_path / "a.pth") == 6
  assert "assuming 6 heads of 64 channels; give --heads" in caplog.text


def test_timm_export_refuses_other_norms(write_run, call, tmp_path, capsys):
  pytest.importorskip("safetensors")
  write_run()
  assert call("--format=timm") == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert "mean: a plain ViT of that library has no such parameter" in line
  assert not (tmp_path / "a.npz").exists()
