"""Google's fine-tuning of ViT-B_16 on CIFAR from ImageNet-21k weights.

`vit_b16_finetune_google.py:DATASET,STEPS`, default `cifar10,500`. The settings
are from github.com/google-research/vision_transformer at c6de1e5:
vit_jax/configs/{common,models,vit}.py and input_pipeline.py. Its README has
short runs: 500 steps with 50 of warm-up, and 1,000 with 100.
`configs/vit_b16_finetune.py` has RescaleViT's recipe.
"""

from rescalevit_jax import config as config_lib


def get_config(run="cifar10,500"):
  """Return the config of a dataset and a number of steps."""
  dataset, _, steps = run.partition(",")
  config = config_lib.default()
  config.dataset = dataset
  config.data.train_split = "train[:98%]"
  config.model_name = "ViT-B_16"
  config.model.norm = "LN"
  config.model.gelu = "tanh"
  config.model.dropout_rate = 0.0
  config.pretrained_path = "ViT-B_16"
  config.image_size = 384
  config.augment.flip = True
  config.batch = 512
  config.accum_steps = 8
  config.batch_eval = 512
  config.base_lr = 0.01 if dataset == "cifar10" else 0.03
  config.total_steps = int(steps or 500)
  config.warmup_steps = min(500, config.total_steps // 10)
  return config
