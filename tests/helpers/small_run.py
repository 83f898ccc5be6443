"""The config of a run on the digits that takes one second."""

from rescalevit_jax import config as config_lib


def config(digits_dir):
  found = config_lib.default()
  found.update(
    {
      "dataset": "digits",
      "tfds_data_dir": str(digits_dir),
      "model_name": "ViT-XS_2",
      "image_size": 8,
      "batch": 48,
      "batch_eval": 100,
      "total_steps": 12,
      "warmup_steps": 3,
      "eval_every": 5,
      "progress_every": 2,
      "checkpoint_every": 4,
    }
  )
  found.model.update(
    {
      "patch_size": 4,
      "hidden_size": 16,
      "mlp_dim": 32,
      "num_heads": 2,
      "num_layers": 1,
      "norm": "Rescale",
    }
  )
  return found
