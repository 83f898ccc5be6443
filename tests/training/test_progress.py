"""Progress, timing and warnings of a run."""

import logging

import jax
import pytest

from rescalevit_jax import models
from rescalevit_jax.models import flops
from rescalevit_jax.models.norms import taper
from rescalevit_jax.runtime import terminal
from rescalevit_jax.training import progress


@pytest.mark.parametrize(
  "seconds, text",
  [
    (0.2, "0 s"),
    (59.6, "1 min 0 s"),
    (200, "3 min 20 s"),
    (1500, "25 min"),
    (3 * 3600 + 130, "3 h 2 min"),
    (100 * 3600, "4 d 4 h"),
  ],
)
def test_format_of_durations(seconds, text):
  assert terminal.duration(seconds) == text


class Clock:
  now = 100.0

  def __call__(self):
    return self.now


def test_timer_excludes_compilation_and_evaluation(monkeypatch, caplog):
  clock = Clock()
  monkeypatch.setattr(progress.time, "monotonic", clock)
  caplog.set_level(logging.INFO)
  timer = progress.Timer(total_steps=100, batch=8, step=10)
  clock.now += 60  # Compilation.
  timer.first_step_done(11)
  clock.now += 4
  assert timer.lap(21) == (10, 4)
  timer.log(1.25, 0.05, 10, 4)
  assert "step 21/100" in caplog.text and "20 images/s" in caplog.text
  assert "ETA 32 s" in caplog.text  # 79 steps at 0.4 s.
  clock.now += 500  # Evaluation.
  timer.restart()
  clock.now += 2
  assert timer.lap(26) == (5, 2)


def test_an_idle_gpu_is_one_warning(monkeypatch, caplog):
  monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
  monkeypatch.setattr(progress.os.path, "exists", lambda path: True)
  progress.warn_of_idle_gpu()
  assert "cuda13" in caplog.text
  caplog.clear()
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  progress.warn_of_idle_gpu()
  monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
  monkeypatch.setattr(progress.os.path, "exists", lambda path: False)
  progress.warn_of_idle_gpu()
  assert not caplog.records


def test_unfinished_norms_are_one_warning(caplog):
  warn, end = progress.warn_of_unfinished_norms, taper.Schedule(0, 90.0, 1.0)
  warn(None, 50, 2)
  warn(end, 90, 2)
  warn(end, 50, 0)
  assert not caplog.records
  warn(end, 88, 2)
  (record,) = caplog.records
  assert "fade.end: " in record.message and "skipped 2" in record.message


def test_duration_of_a_long_run_is_estimated(monkeypatch, caplog):
  monkeypatch.setattr(progress, "_matmul_flops_per_second", lambda dtype: 1e11)
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  model = models.create("ViT-B_16", num_classes=10)
  # 35.1 GFLOP per image, published as 17.6 G multiply-adds.
  assert flops.forward_flops(model.config) == pytest.approx(35.1e9, rel=0.01)
  run = dict(batch=128, gradients=1, eval_images=10_000)
  progress.warn_of_long_run(model, steps=3, evaluations=0, **run)
  assert "estimated run time" not in caplog.text
  progress.warn_of_long_run(model, steps=20_000, evaluations=200, **run)
  assert "3.4e+02 s for each of 20000 steps" in caplog.text
  assert "2 h 26 min for each of 200 evaluations" in caplog.text
  assert "98 d 9 h on" in caplog.text


def test_flops_include_the_pre_logits_layer():
  plain, wide = (
    flops.forward_flops(
      models.create("ViT-B_16", num_classes=10, representation_size=r).config
    )
    for r in (None, 1000)
  )
  assert wide - plain == 2 * 768 * 1000 + 2 * (1000 - 768) * 10


def test_duration_of_a_short_run_is_not_estimated(monkeypatch):
  monkeypatch.setattr(progress, "_matmul_flops_per_second", None)
  model = models.create("ViT-B_16", num_classes=10)
  run = dict(batch=8, gradients=1, eval_images=100, evaluations=1)
  progress.warn_of_long_run(model, steps=1, **run)
