"""Saving, restoring and verifying checkpoints."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rescalevit_jax import errors
from rescalevit_jax.runs import checkpoint
from rescalevit_jax.runs import checkpoint_folders
from rescalevit_jax.runs import checksums
from rescalevit_jax.runs import folder as folder_lib
from rescalevit_jax.training import train_state


def state(value, width=3):
  x = {"head": {"kernel": jnp.full((2, width), float(value))}}
  return train_state.TrainState(
    step=jnp.asarray(7, jnp.int32),
    params=x,
    batch_stats={},
    opt_state=(jax.tree.map(jnp.zeros_like, x), ()),
  )


def like(s):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), s
  )


def save(checkpoints, state, progress):
  checkpoints.save(state.to_checkpoint(), progress)


def save_best(checkpoints, state, progress):
  checkpoints.save_best(state.evaluated, progress)


def restore(checkpoints, state):
  items, progress = checkpoints.restore(like(state).to_checkpoint())
  return state.from_checkpoint(items, progress.skipped_steps), progress


def test_state_and_progress_are_restored(tmp_path):
  progress = checkpoint.Progress(step=7, best_accuracy=0.3, best_step=5)
  with checkpoint.Checkpoints(tmp_path, 2) as saved:
    assert saved.latest_step() is None
    save_best(saved, state(0.05), checkpoint.Progress(step=5))
    save(saved, state(0.1), progress)
  with checkpoint.Checkpoints(tmp_path, 2) as saved:
    found, again = restore(saved, state(0))
  assert again == progress
  assert jax.tree.structure(found) == jax.tree.structure(state(0))
  for x, y in zip(
    jax.tree.leaves(found), jax.tree.leaves(state(0.1)), strict=True
  ):
    np.testing.assert_array_equal(x, y)


def test_load_variables_returns_averages_and_restore_returns_both(tmp_path):
  averaging = state(0.1).replace(ema=state(0.7).evaluated)
  with checkpoint.Checkpoints(tmp_path, 2) as saved:
    save_best(saved, averaging, checkpoint.Progress(step=7, best_step=7))
    save(saved, averaging, checkpoint.Progress(step=7, best_step=7))
  with checkpoint.Checkpoints(tmp_path, 2) as saved:
    found, _ = restore(saved, averaging)
  assert jax.tree.structure(found) == jax.tree.structure(averaging)
  assert (found.params["head"]["kernel"] == np.float32(0.1)).all()
  assert (found.ema["params"]["head"]["kernel"] == np.float32(0.7)).all()
  for which in ("best", "latest"):
    params, _, _ = checkpoint.load_variables(tmp_path, which)
    assert (params["head"]["kernel"] == np.float32(0.7)).all()


def test_the_next_step_does_not_change_a_saved_state(tmp_path):
  """Saving is asynchronous, and the next step donates the state's buffers."""
  s = state(1.0, width=200_000)
  step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  with checkpoint.Checkpoints(tmp_path, 2) as saved:
    save(saved, s, checkpoint.Progress(step=7))
    for _ in range(5):
      s = step(s)
  params, _, _ = checkpoint.load_variables(tmp_path, "latest")
  assert (params["head"]["kernel"] == 1.0).all()


def test_best_checkpoint_after_the_resumed_step_is_discarded(tmp_path):
  with checkpoint.Checkpoints(tmp_path, 1) as saved:
    save_best(saved, state(0.5), checkpoint.Progress(step=5))
    save(
      saved,
      state(0.7),
      checkpoint.Progress(step=7, best_accuracy=0.4, best_step=5),
    )
    save_best(saved, state(1.0), checkpoint.Progress(step=10))
  with checkpoint.Checkpoints(tmp_path, 1) as saved:
    _, progress = restore(saved, state(0))
    # The best checkpoint of step 5 was overwritten, so the next becomes best.
    assert (progress.best_accuracy, progress.best_step) == (-1, 0)
  with checkpoint.Checkpoints(tmp_path, 1) as saved:
    # Killed again before the next best checkpoint.
    _, progress = restore(saved, state(0))
    assert (progress.best_accuracy, progress.best_step) == (-1, 0)
    save_best(saved, state(0.9), checkpoint.Progress(step=9))
    saved.wait()
    save_best(saved, state(1.1), checkpoint.Progress(step=10))
  params, _, step = checkpoint.load_variables(tmp_path, "best")
  assert step == 10
  np.testing.assert_array_equal(
    params["head"]["kernel"], np.full((2, 3), 1.1, np.float32)
  )


def test_load_variables_of_a_run_that_is_training(tmp_path, monkeypatch):
  with checkpoint.Checkpoints(tmp_path, 1) as saved:
    save_best(saved, state(0.5), checkpoint.Progress(step=5))
  verify, replaced = checksums.verify, []

  def verify_late(folder):
    """Verify after the run has saved its next best checkpoint."""
    if not replaced:
      replaced.append(folder)
      with checkpoint.Checkpoints(tmp_path, 1) as saved:
        save_best(saved, state(0.9), checkpoint.Progress(step=9))
    verify(folder)

  monkeypatch.setattr(checksums, "verify", verify_late)
  params, _, step = checkpoint.load_variables(tmp_path, "best")
  assert step == 9
  assert (params["head"]["kernel"] == np.float32(0.9)).all()
  assert not replaced[0].exists()


@pytest.mark.parametrize(
  "name", ["variables/_METADATA", "variables", "progress"]
)
def test_load_variables_detects_damage(tmp_path, name):
  with checkpoint.Checkpoints(tmp_path, 1) as saved:
    save_best(saved, state(0.1), checkpoint.Progress(step=7))
  path = tmp_path / "checkpoints" / "best" / "7" / name
  if path.is_dir():
    shutil.rmtree(path)
  else:
    path.write_text(path.read_text() + "x")
  with pytest.raises(errors.UserError, match="best/7.*damaged"):
    checkpoint.load_variables(tmp_path, "best")


def test_a_stale_best_checkpoint_is_removed_atomically(tmp_path, monkeypatch):
  """A kill during deletion leaves no damaged checkpoint."""

  def killed(path, **kwargs):
    if path.exists():
      (path / "SHA256SUMS").unlink()
      raise KeyboardInterrupt

  with checkpoint.Checkpoints(tmp_path) as saved:
    save(saved, state(0.1), checkpoint.Progress(step=2))
    save_best(saved, state(0.2), checkpoint.Progress(step=3, best_step=3))
  with monkeypatch.context() as patch:
    patch.setattr(shutil, "rmtree", killed)
    with checkpoint.Checkpoints(tmp_path) as saved:
      with pytest.raises(KeyboardInterrupt):
        restore(saved, state(0))
  assert folder_lib.saved_steps(tmp_path, "best") == []
  checkpoint_folders.move_damaged(tmp_path)
  with checkpoint.Checkpoints(tmp_path) as saved:
    _, progress = restore(saved, state(0))
  assert progress.step == 2
  folders = [path.name for path in (tmp_path / "checkpoints").iterdir()]
  assert sorted(folders) == ["best", "last"]
  assert not list((tmp_path / "checkpoints" / "best").iterdir())


def test_checkpoint_of_another_model_is_refused(tmp_path):
  with checkpoint.Checkpoints(tmp_path, 1) as saved:
    save(saved, state(0.1), checkpoint.Progress(step=7))
    saved.wait()
    with pytest.raises(errors.UserError, match="last/7.*not of this model"):
      restore(saved, state(0, width=4))
    progress = tmp_path / "checkpoints/last/7/progress/metadata"
    progress.write_text('{"steps": 7}')
    with pytest.raises(errors.UserError, match="last/7.*damaged.*'steps'"):
      restore(saved, state(0))


def test_checksums_detect_damage_of_every_file(tmp_path):
  with checkpoint.Checkpoints(tmp_path, 1) as saved:
    save(saved, state(0.1), checkpoint.Progress(step=7))
  folder = tmp_path / "checkpoints" / "last" / "7"
  checksums.verify(folder)
  files = [p for p in folder.glob("*/**/*") if p.stat().st_size and p.is_file()]
  assert len(files) > 5
  for path in files:
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
      whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    )
    with pytest.raises(errors.UserError, match="SHA-256 differs"):
      checksums.verify(folder)
    if path.parent.name == "progress":  # Orbax does not read this file.
      with pytest.raises(errors.UserError, match="SHA-256 differs"):
        checkpoint.load_variables(tmp_path, "latest")
    path.unlink()
    with pytest.raises(errors.UserError, match="No such file"):
      checksums.verify(folder)
    path.write_bytes(whole)
  checksums.verify(folder)
  (folder / checksums.NAME).write_text("")
  with pytest.raises(errors.UserError, match="missing or damaged"):
    checksums.verify(folder)


@pytest.mark.parametrize("name", ["/dev/zero", "../b", "link"])
def test_checksums_of_files_outside_the_folder_are_refused(name, tmp_path):
  folder = tmp_path / "a"
  folder.mkdir()
  (folder / "link").symlink_to("/dev/zero")
  (folder / checksums.NAME).write_text(f"{'0' * 64}  {name}\n")
  with pytest.raises(errors.UserError, match=f"'{name}' is in another"):
    checksums.verify(folder)


def test_missing_checkpoint_is_reported(tmp_path):
  with pytest.raises(errors.UserError, match="no best checkpoint; give the"):
    checkpoint.load_variables(tmp_path, "best")
  (tmp_path / "checkpoints" / "last" / "3").mkdir(parents=True)
  with pytest.raises(errors.UserError, match="no best checkpoint yet; choose"):
    checkpoint.load_variables(tmp_path, "best")


def test_damaged_step_5_is_distinguished_from_step_50(tmp_path):
  (tmp_path / "checkpoints" / "damaged" / "best-50").mkdir(parents=True)
  assert checkpoint_folders.was_damaged(tmp_path, "best", 50)
  assert not checkpoint_folders.was_damaged(tmp_path, "best", 5)
