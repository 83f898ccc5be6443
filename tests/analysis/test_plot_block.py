"""The diagram of an encoder block."""

from rescalevit_jax.analysis import plot_block
from rescalevit_jax.models import norms
from rescalevit_jax.models import vit_config


def test_diagram_names_every_norm_and_residual(tmp_path):
  assert plot_block.main([f"--output={tmp_path / 'block.svg'}"]) == 0
  assert (tmp_path / "block.svg").stat().st_size > 5000
  texts = plot_block.draw().axes[0].texts
  texts = [x.get_text().replace("\n", " ") for x in texts]
  assert "model.norm: " + ", ".join(norms.NORMS) in texts
  assert "model.residual: " + ", ".join(vit_config.RESIDUALS) in texts


def test_other_formats_are_refused(tmp_path, capsys):
  assert plot_block.main([f"--output={tmp_path / 'block.gif'}"]) == 1
  assert ".png or .svg" in capsys.readouterr().err
