"""Config overrides that enable all optional features, by dotted key."""

_EVERYTHING = {
  "ema_decay": 0.9,
  "label_smoothing": 0.1,
  "mixup": 0.8,
  "cutmix": 1.0,
  "agc": 0.05,
  "lr_mult": "scalars:0.1",
  "layer_decay": 0.9,
  "wd_mult": "cls:1 head/*:0",
  "weight_decay": 0.1,
  "augment.auto": "trivial",
  "augment.random_erasing": 0.5,
  "augment.flip": True,
  "model.stochastic_depth": 0.3,
  "model.pool": "gap",
}
RECIPES = {
  "sgd": {**_EVERYTHING, "accum_steps": 2},
  "adamw": {
    **_EVERYTHING,
    "optimizer": "adamw",
    "base_lr": 1e-3,
    "dtype": "bfloat16",
    "accum_steps": 3,
    "augment.crop": False,
    "augment.pad_crop": 1,
  },
  "muon": {
    **_EVERYTHING,
    "optimizer": "muon",
    "base_lr": 3e-3,
    "augment.auto": "rand",
    "augment.color_jitter": 0.3,
  },
  "float16": {
    **_EVERYTHING,
    "dtype": "float16",
    "accum_steps": 2,
    "sam_rho": 0.05,
  },
}
