"""Predictions on the command line and from Python."""

import csv
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import paths
from PIL import Image
import pytest
import trees

from rescalevit_jax import errors
from rescalevit_jax import export
from rescalevit_jax import predict
from rescalevit_jax.analysis import imagenet_names
from rescalevit_jax.analysis import npz_model
from rescalevit_jax.analysis import trained_model
from rescalevit_jax.data import image_files

NAMES = ("red", "green, or so", "blue")


class Colors:
  """A model whose logits are the means of the color channels, times 2."""

  def apply(self, variables, x, train):
    return 2 * x.mean((1, 2))


@pytest.fixture
def colors(monkeypatch):
  """Make the command line load this model."""
  model = trained_model.TrainedModel("colors", Colors(), {}, 4, NAMES)

  def load(workdir, which):
    if workdir != "run":
      raise errors.UserError(f"{workdir}: no run there")
    model.checkpoint = which
    return model

  monkeypatch.setattr(trained_model, "load", load)
  return model


@pytest.fixture
def call(colors, tmp_path, monkeypatch, capsys):
  """Return a function that runs the command and returns its output by line."""
  monkeypatch.chdir(tmp_path)

  def call(*args):
    code = predict.main(["--workdir=run", *args])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err.splitlines()

  return call


@pytest.fixture
def picture(tmp_path):
  """Return a function that writes an image of one color."""

  def picture(name, color):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 6), color).save(path, "PNG")

  return picture


# Output.


def test_one_line_per_image_is_printed(call, picture):
  picture("a.png", "red")
  picture("folder/longer.png", "blue")
  picture("folder/blue", "blue")  # Has no image suffix.
  code, out, err = call("a.png", "folder")
  # Channels are 1 and -1, so logits are 2 and -2.
  first, other = 100 * np.exp([2, -2]) / (np.exp(2) + 2 * np.exp(-2))
  first, other = f" {first:.1f} %", f"  {other:.1f} %"
  assert code == 0 and err == []
  assert out == [
    f"a.png              red          {first}  green, or so {other}"
    f"  blue         {other}",
    f"folder/longer.png  blue         {first}  red          {other}"
    f"  green, or so {other}",
  ]


def test_a_file_argument_may_have_any_suffix(call, picture):
  picture("photo", "red")
  code, out, _ = call("photo", "--top=1")
  assert code == 0 and out == ["photo  red           96.5 %"]


def test_csv_output(call, picture):
  picture("a,b.png", (0, 255, 0))
  picture("c.png", "red")
  code, out, err = call("a,b.png", "c.png", "--output=o.csv", "--top=2")
  assert code == 0 and out == ["o.csv: 2 images"] and err == []
  with open("o.csv", encoding="utf-8", newline="") as f:
    header, *rows = csv.reader(f)
  assert header == [
    *("file", "class_1", "probability_1", "class_2", "probability_2")
  ]
  assert [row[:2] for row in rows] == [["a,b.png", NAMES[1]], ["c.png", "red"]]
  assert float(rows[0][2]) == pytest.approx(0.9647, abs=1e-4)
  assert float(rows[0][4]) == pytest.approx(0.0177, abs=1e-4)


def test_json_output(call, picture):
  picture("ä.png", "blue")
  code, _, _ = call("ä.png", "--output=o.JSON")
  assert code == 0
  (found,) = json.loads(pathlib.Path("o.JSON").read_text(encoding="utf-8"))
  assert found.keys() == {"file", "top"} and found["file"] == "ä.png"
  assert [entry["class"] for entry in found["top"]] == ["blue", *NAMES[:2]]
  total = sum(entry["probability"] for entry in found["top"])
  assert total == pytest.approx(1, abs=1e-5)


def test_top_is_limited_to_the_number_of_classes(call, picture):
  picture("a.png", "red")
  assert call("a.png", "--top=99", "--output=o.csv")[0] == 0
  header = pathlib.Path("o.csv").read_text().splitlines()[0]
  assert header.endswith("class_3,probability_3")


def test_control_characters_of_a_class_name_are_escaped(colors, call, picture):
  picture("a.png", "red")
  colors.class_names = ("red\x1b[31m", "green", "blue")
  code, out, _ = call("a.png", "--top=1")
  assert code == 0 and r"red\x1b[31m" in out[0] and "\x1b" not in out[0]
  colors.class_names = ("red\udcff", "green", "blue")
  first = call("a.png", "--top=1")[1][0].removesuffix(" %")
  assert len(first) == len(r"a.png  red\udcff 100.0")
  colors.class_names = ("全角\u3000空白", "می\u200cخواهم", "caf\xe9")
  assert colors.class_names[0] in call("a.png", "--top=1")[1][0]


@pytest.mark.parametrize("name", ["o.csv", "o.json", None])
def test_newlines_and_invalid_bytes_in_names_are_escaped(name, call, picture):
  bad = os.fsdecode(b"\xff.png")
  picture(bad, "red")
  picture("two\nlines.png", "red")
  output = [f"--output={name}"] if name else []
  code, out, err = call(bad, "two\nlines.png", *output)
  assert code == 0 and err == []
  if name is None:
    assert len(out) == 2 and "two lines.png" in out[1]
  else:
    assert r"\udcff.png" in pathlib.Path(name).read_text().replace("\\\\", "\\")


def test_classes_are_aligned_after_an_escaped_name(call, picture):
  names = os.fsdecode(b"\xff.png"), "a.png"
  for name in names:
    picture(name, "red")
  _, (first, second), _ = call(*names)
  assert first.index("red") == second.index("red")


def test_checkpoint_flag_selects_the_checkpoint(call, colors, picture):
  picture("a.png", "red")
  assert call("a.png")[0] == 0 and colors.checkpoint == "best"
  assert call("a.png", "--checkpoint=latest")[0] == 0
  assert colors.checkpoint == "latest"


# Invalid files.


@pytest.mark.parametrize("output", [None, "o.json"])
def test_invalid_files_are_named_and_skipped(output, call, picture):
  for i in range(5):
    picture(f"in/{i}.png", "red")
  pathlib.Path("in/1.png").write_text("no image")
  pathlib.Path("in/3.png").write_text("")
  args = [f"--output={output}"] if output else []
  code, out, err = call("in", "none.png", "--batch=2", *args)
  assert code == 1
  starts = [
    "skipped: in/1.png: cannot be read",
    "skipped: in/3.png: cannot be read",
    "skipped: none.png: cannot be read",
    "error: 3 of 6 files could not be",
  ]
  assert len(err) == 4 and all(map(str.startswith, err, starts))
  if output:
    found = json.loads(pathlib.Path(output).read_text())
    files = [entry["file"] for entry in found]
  else:
    files = [line.split()[0] for line in out]
  assert files == ["in/0.png", "in/2.png", "in/4.png"]


def test_only_invalid_files_is_an_error(call):
  pathlib.Path("a.png").write_text("no image")
  code, out, err = call("a.png")
  assert code == 1 and out == [] and len(err) == 2
  assert call("a.png", "--output=o.csv")[0] == 1
  assert len(pathlib.Path("o.csv").read_text().splitlines()) == 1


def test_warnings_of_pillow_are_not_shown(call, picture, monkeypatch, recwarn):
  picture("a.png", "red")
  monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
  assert call("a.png")[0] == 0
  assert not recwarn.list


def test_an_empty_folder_is_named_and_skipped(call, picture):
  picture("in/a.png", "red")
  pathlib.Path("none").mkdir()
  code, out, err = call("none", "in")
  assert code == 1 and out[0].startswith("in/a.png") and len(out) == 1
  assert err == [
    "skipped: none: no images in this folder",
    "error: 1 folders have no images, see above",
  ]
  assert call("none")[1:] == (
    [],
    [err[0], "error: no images to classify; give image files"],
  )


# Invalid arguments.


@pytest.mark.parametrize(
  "args, words",
  [
    (["in", "--output=o.txt"], ("o.txt", ".csv", ".json")),
    (["in", "--output=none/o.csv"], ("none/o.csv", "folder")),
    (["in", "--output=folder.csv"], ("folder.csv", "folder")),
  ],
)
def test_invalid_arguments_are_reported_before_loading(
  args, words, call, picture, monkeypatch
):
  picture("in/a.png", "red")
  pathlib.Path("folder.csv").mkdir()
  monkeypatch.setattr(trained_model, "load", None)
  before = set(pathlib.Path().rglob("*"))
  code, out, err = call(*args)
  assert code == 1 and out == [] and len(err) == 1
  assert err[0].startswith("error: ")
  for word in words:
    assert word in err[0]
  assert set(pathlib.Path().rglob("*")) == before


def test_a_missing_run_is_a_one_line_error(call, picture):
  picture("a.png", "red")
  code, out, err = call("a.png", "--workdir=other")
  assert (code, out, err) == (1, [], ["error: other: no run there"])


@pytest.mark.parametrize(
  "args",
  [["--top=0", "a"], ["--batch=-1", "a"], ["--top=x", "a"], [], ["--x", "a"]],
)
def test_command_line_errors(args, call, capsys):
  with pytest.raises(SystemExit) as caught:
    call(*args)
  assert caught.value.code == 2
  assert "error: " in capsys.readouterr().err.splitlines()[-1]


def test_out_of_memory_suggests_a_smaller_batch(
  call, picture, colors, monkeypatch
):
  def full(*args):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of\nmemory")

  monkeypatch.setattr(colors, "probabilities", full)
  picture("a.png", "red")
  code, _, err = call("a.png")
  assert code == 1 and len(err) == 1
  assert err[0].startswith("error: RESOURCE") and "smaller batch" in err[0]


def test_keyboard_interrupt_is_one_line(call, picture, monkeypatch):
  picture("a.png", "red")

  def interrupt(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(image_files, "model_input", interrupt)
  assert call("a.png", "--output=o.csv") == (130, [], ["error: interrupted"])
  assert not pathlib.Path("o.csv").exists()


# Many images.


def test_at_most_two_batches_are_in_memory(colors, tmp_path, monkeypatch):
  Image.new("RGB", (5, 6), "red").save(tmp_path / "a.png")
  taken, read = [], []

  def endless():
    while True:
      taken.append(tmp_path / "a.png")
      yield taken[-1]

  model_input = image_files.model_input

  def counted(*args):
    read.append(args)
    return model_input(*args)

  monkeypatch.setattr(image_files, "model_input", counted)
  results = predict.classify(colors, endless(), batch=4)
  for done in range(1, 30):
    next(results)
    batches = -(-done // 4)
    assert len(taken) <= 4 * (batches + 1) and len(read) <= len(taken)
  results.close()


def test_the_next_batch_is_read_while_the_device_computes(
  colors, tmp_path, monkeypatch
):
  for i in range(2):
    Image.new("RGB", (2, 2)).save(tmp_path / f"{i}.png")
  model_input, second = image_files.model_input, threading.Event()

  def read(path, *args):
    if path.name == "1.png":
      second.set()
    return model_input(path, *args)

  def probabilities(inputs, batch):
    assert second.wait(30)
    return np.zeros((len(inputs), 3), np.float32)

  monkeypatch.setattr(image_files, "model_input", read)
  monkeypatch.setattr(colors, "probabilities", probabilities)
  files = sorted(tmp_path.iterdir())
  assert len(list(predict.classify(colors, files, batch=1))) == 2


@pytest.mark.parametrize("count", [1, 4, 5, 8])
def test_every_file_is_classified_once_in_order(count, colors, tmp_path):
  for i in range(count):
    Image.new("RGB", (2, 2), (0, 0, 50 * i)).save(tmp_path / f"{i}.png")
  files = sorted(tmp_path.iterdir())
  found = list(predict.classify(colors, files, batch=4))
  assert [path for path, _ in found] == files
  expected = colors(files)
  np.testing.assert_allclose([row for _, row in found], expected, atol=1e-6)


def test_progress_is_printed(call, picture, monkeypatch):
  for i in range(5):
    picture(f"in/{i}.png", "red")
  assert call("in", "--batch=2")[2] == []
  monkeypatch.setattr(predict, "_SECONDS_BETWEEN_LINES", 0)
  _, out, err = call("in", "--batch=2")
  assert len(out) == 5
  assert [line.split()[2] for line in err] == ["3/5", "4/5", "5/5"]
  assert all("images/s  ETA" in line for line in err)


# A real run in subprocesses.


@pytest.fixture
def digits(test_digits, tmp_path):
  """Write the test split as files; return their folder and labels."""
  folder = tmp_path / "digits"
  folder.mkdir()
  for i, image in enumerate(test_digits.images):
    Image.fromarray(image).save(folder / f"{i:03}.png")
  return folder, test_digits.labels


def process(run, *args, **kwargs):
  env = {**os.environ, "JAX_PLATFORMS": "cpu"}
  env.pop("PYTHONUNBUFFERED", None)  # It would hide missing flushes.
  return subprocess.Popen(
    [sys.executable, "-m", "rescalevit_jax.predict", "--workdir", run, *args],
    cwd=paths.ROOT,
    env=env,
    stderr=subprocess.PIPE,
    text=True,
    **kwargs,
  )


def test_predictions_are_as_accurate_as_the_evaluation(
  tiny_run, digits, tmp_path, capsys
):
  folder, labels = digits
  output = tmp_path / "o.json"
  args = ["--workdir", str(tiny_run), str(folder), "--output", str(output)]
  assert predict.main(args) == 0
  assert not capsys.readouterr().err
  found = json.loads(output.read_text())
  assert len(found) == 360
  best = json.loads((tiny_run / "result.json").read_text())["best_accuracy"]
  right = [int(x["top"][0]["class"]) for x in found] == labels
  assert np.mean(right) == pytest.approx(best, abs=1e-9)
  # The Python API gives the same accuracy.
  model = predict.load(tiny_run)
  probabilities = model(sorted(folder.iterdir()))
  right = probabilities.argmax(axis=1) == labels
  assert np.mean(right) == pytest.approx(best, abs=1e-9)


@pytest.mark.parametrize(
  "output", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_closed_stdout_ends_the_command(output, tiny_run, digits, tmp_path):
  read, write = os.pipe()
  os.close(read)
  args = [f"--output={tmp_path / 'o.csv'}"] if output else []
  child = process(tiny_run, digits[0], *args, stdout=write)
  os.close(write)
  _, err = child.communicate(timeout=120)
  assert err == "" and child.returncode == 1


def test_sigint_ends_the_command(tiny_run, digits, tmp_path):
  many = [str(digits[0])] * 200
  child = process(tiny_run, *many, "--batch=8", stdout=subprocess.PIPE)
  child.stdout.readline()
  child.send_signal(signal.SIGINT)
  _, err = child.communicate(timeout=120)
  assert child.returncode == 130
  assert err == "error: interrupted\n"


def test_importing_needs_no_tensorflow():
  code = (
    "import sys; from rescalevit_jax import predict;"
    " assert not {'tensorflow', 'matplotlib'} & sys.modules.keys()"
  )
  subprocess.run([sys.executable, "-c", code], cwd=paths.ROOT, check=True)


def test_letters_that_the_terminal_lacks_are_escaped(
  tiny_run, tmp_path, monkeypatch
):
  path = tmp_path / "ünï.png"
  Image.new("RGB", (8, 8), "red").save(path)
  monkeypatch.setenv("PYTHONIOENCODING", "ascii")
  child = process(tiny_run, path, stdout=subprocess.PIPE)
  out, _ = child.communicate(timeout=120)
  assert child.returncode == 0 and r"\xfcn\xef.png" in out


def test_head_of_zeros_is_an_error(tmp_path, capsys):
  """Google's ImageNet-21k files have a head of zeros."""
  arrays = trees.arrays()
  arrays["head/kernel"] *= 0
  path = trees.write(tmp_path, arrays)
  Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
  assert predict.main([f"--npz={path}", str(tmp_path / "x.png")]) == 1
  captured = capsys.readouterr()
  assert not captured.out and "zeros" in captured.err.splitlines()[-1]


@pytest.mark.skipif(
  importlib.util.find_spec("timm") is None, reason="needs the extra timm"
)
def test_imagenet_class_names(tmp_path):
  """The first and last class of each version have WordNet's names."""
  for classes, first, last in (
    (1000, "tench, Tinca tinca", "toilet tissue"),
    (11821, "benthos", "knothole"),
    (21841, "organism, being", "knothole"),
    (21843, "organism, being", "knothole"),
  ):
    names = imagenet_names.find(classes)
    assert len(names) == classes
    assert names[0].startswith(first) and names[-1].startswith(last)
  assert imagenet_names.find(10) is None and imagenet_names.find(1234) is None
  path = trees.write(tmp_path, trees.arrays(num_classes=1000))
  assert npz_model.load(path).class_names[999].startswith("toilet")


def test_npz_gives_the_predictions_of_its_run(tiny_run, tmp_path, capsys):
  weights = tmp_path / "a.npz"
  flags = [f"--workdir={tiny_run}", f"--output={weights}"]
  assert export.main(flags) == 0
  Image.new("RGB", (8, 8), (90, 90, 90)).save(tmp_path / "x.png")
  outputs = []
  for name, source in (
    ("a", f"--npz={weights}"),
    ("b", f"--workdir={tiny_run}"),
  ):
    path = tmp_path / f"{name}.json"
    flags = [source, str(tmp_path / "x.png"), f"--output={path}"]
    assert predict.main(flags) == 0
    outputs.append(json.loads(path.read_text()))
  (a,), (b,) = outputs
  assert str(a) != "" and a.keys() == b.keys()
  assert repr(a) == repr(b)
