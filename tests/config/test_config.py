"""Names, types and ranges of the config keys."""

import paths
import pytest

from rescalevit_jax import config as config_lib
from rescalevit_jax import errors
from rescalevit_jax.config import __main__ as page_lib


def test_default_is_valid_and_equals_rescalevits_recipe():
  config = config_lib.default()
  config_lib.validate(config)
  assert (config.base_lr, config.warmup_steps) == (0.05, 500)
  assert (config.total_steps, config.batch) == (20_000, 128)
  assert (config.momentum, config.weight_decay) == (0.9, 0.0)
  assert config.grad_norm_clip == 1.0
  assert (config.optimizer, config.agc) == ("sgd", 0.0)
  assert (config.ema_decay, config.label_smoothing) == (0.0, 0.0)
  assert (config.mixup, config.cutmix) == (0.0, 0.0)
  assert (config.model.stochastic_depth, config.model.pool) == (0.0, "cls")
  assert config.eval_every == 100
  assert config.augment.to_dict() == {
    "crop": True,
    "min_area": 0.05,
    "min_aspect": 0.75,
    "flip": False,
    "pad_crop": 0,
    "auto": "none",
    "rand_ops": 2,
    "rand_magnitude": 9.0,
    "color_jitter": 0.0,
    "random_erasing": 0.0,
  }
  assert config.model.gelu == "erf" and config.model.dropout_rate == 0.1


@pytest.mark.parametrize(
  "key, value, words",
  [
    ("model.norm", "LayerNorm", "LN"),
    ("model.norm", "rescale", "did you mean Rescale"),
    ("model_name", "ViT-B16", "did you mean ViT-B_16"),
    ("model.gelu", "relu", "erf, tanh"),
    ("model.residual", "layer_scale", "layerscale"),
    ("model.residual_c", -1.0, "> 0"),
    ("calibration", "always", "auto, all, none"),
    ("fade.begin", 0.8, "exceeds fade.end"),
    ("fade.end", 1.1, "[0, 1]"),
    ("fade.site_fraction", 0.0, "(0, 1]"),
    ("fade.alpha", -0.5, ">= 0"),
    ("model.init", "jax", "torch, google"),
    ("model.dropout_rate", 1.0, "[0, 1)"),
    ("model.patch_size", 0, "> 0"),
    ("decay_type", "cosin", "cosine"),
    ("dtype", "half", "bfloat16, float16"),
    ("batch", 0, "> 0"),
    ("batch", -1, "> 0"),
    ("batch_eval", 0, "> 0"),
    ("base_lr", float("nan"), "> 0"),
    ("base_lr", float("inf"), "> 0"),
    ("warmup_steps", -1, ">= 0"),
    ("total_steps", 0, "> 0"),
    ("accum_steps", 0, "> 0"),
    ("accum_steps", 3, "accum_steps"),
    ("eval_every", 0, "> 0"),
    ("weight_decay", -0.1, ">= 0"),
    ("grad_norm_clip", -1.0, ">= 0"),
    ("optimizer", "adam", "did you mean adamw"),
    ("adam_b2", 1.0, "[0, 1)"),
    ("agc", -0.1, ">= 0"),
    ("ema_decay", 1.0, "[0, 1)"),
    ("label_smoothing", 1.0, "[0, 1)"),
    ("mixup", -0.2, ">= 0"),
    ("cutmix", float("nan"), ">= 0"),
    ("model.stochastic_depth", 1.0, "[0, 1)"),
    ("model.pool", "mean", "cls, gap"),
    ("augment.pad_crop", -1, ">= 0"),
    ("augment.pad_crop", 4, "augment.crop (True) are both"),
    ("augment.auto", "random", "none, trivial"),
    ("augment.rand_ops", 0, "> 0"),
    ("augment.rand_magnitude", 10.5, "[0, 10]"),
    ("augment.color_jitter", 1.1, "[0, 1]"),
    ("augment.random_erasing", 1.1, "[0, 1]"),
    ("momentum", 1.0, "[0, 1)"),
    ("lr_mult", "scalars", "PATTERN:FACTOR"),
    ("lr_mult", "scalars:-1", "PATTERN:FACTOR"),
    ("wd_mult", "scalars:", "PATTERN:FACTOR"),
    ("layer_decay", 0.0, "(0, 1]"),
    ("min_lr", 0.06, "exceeds base_lr"),
    ("decay_steps", 19_501, "exceed total_steps"),
    ("sam_rho", -0.1, ">= 0"),
    ("seed", -1, "2^32"),
    ("augment.min_area", 0.0, "(0, 1]"),
    ("augment.min_aspect", 1.5, "[0.01, 1]"),
    ("eval_weights", "newest", "latest"),
    ("warmup_steps", 30_000, "total_steps"),
  ],
)
def test_invalid_values_name_the_key_and_valid_values(key, value, words):
  config = config_lib.default()
  config.update_from_flattened_dict({key: value})
  with pytest.raises(errors.UserError) as e:
    config_lib.validate(config)
  assert key in str(e.value) and words in str(e.value)
  assert "\n" not in str(e.value)


@pytest.mark.parametrize(
  "values",
  [
    {"warmup_steps": 500, "decay_steps": 19_600, "total_steps": 20_000},
    {"min_lr": 0.001, "warmup_steps": 500, "total_steps": 500},
    {"calibration": "all", "model.alpha_init": "0.5"},
    {"calibration": "none", "model.alpha_init": "calibrated"},
    {"spectral_cap": 1.0, "model.sigma_reparam": True},
    {"augment.pad_crop": 4, "augment.crop": True},
    {"batch": 8, "accum_steps": 8, "mixup": 0.2, "cutmix": 0.0},
  ],
)
def test_conflicts_quote_the_values_of_all_keys(values):
  config = config_lib.default()
  config.update_from_flattened_dict(values)
  with pytest.raises(errors.UserError, match=r"^config: .*; ") as e:
    config_lib.validate(config)
  for key, value in values.items():
    assert f"{key} ({value})" in str(e.value)


def test_an_initial_alpha_precedes_a_calibration_of_all_norms():
  config = config_lib.default()
  config.update_from_flattened_dict(
    {"calibration": "all", "model.alpha_init": "0.5,calibrated,0.2"}
  )
  with pytest.raises(errors.UserError, match="overrides calibration .all.; "):
    config_lib.validate(config)


def test_sigma_reparam_with_spectral_cap_is_an_error():
  config = config_lib.default()
  config.spectral_cap, config.model.sigma_reparam = 1.0, True
  with pytest.raises(errors.UserError, match="spectral_cap .1.0. has no eff"):
    config_lib.validate(config)


@pytest.mark.parametrize("key", ["mixup", "cutmix"])
def test_mixing_requires_two_images(key):
  config = config_lib.default()
  config.update({key: 0.5, "batch": 8, "accum_steps": 4})
  config_lib.validate(config)
  config.accum_steps = 8
  with pytest.raises(errors.UserError, match="mixup.*cutmix.*accum_steps"):
    config_lib.validate(config)
  # With accum_steps=1, only a larger batch helps.
  config.update({"batch": 1, "accum_steps": 1})
  with pytest.raises(errors.UserError, match="raise batch"):
    config_lib.validate(config)
  config[key] = 0.0
  config_lib.validate(config)


def test_a_misspelt_key_names_the_nearest():
  config = config_lib.default()
  config.model.nrom = "LN"
  with pytest.raises(errors.UserError, match=r"model\.nrom.*model\.norm"):
    config_lib.validate(config)


def test_a_missing_key_is_named():
  config = config_lib.default()
  del config["momentum"]
  with pytest.raises(errors.UserError, match="momentum"):
    config_lib.validate(config)


def test_json_keeps_every_key():
  config = config_lib.default()
  config.model.hidden_size = 48
  config.pretrained_path = "a.npz"
  again = config_lib.from_json(config_lib.to_json(config))
  assert config_lib.flatten(again) == config_lib.flatten(config)
  config_lib.validate(again)


def test_differences_exclude_keys_without_effect_on_results():
  a, b = config_lib.default(), config_lib.default()
  b.keep_checkpoints = 7
  b.tfds_data_dir = "elsewhere"
  assert config_lib.differing_keys(a, b) == []
  b.model.norm = "BN"
  b.seed = 3
  assert config_lib.differing_keys(a, b) == [
    "model.norm ('LN' there, 'BN' now)",
    "seed (0 there, 3 now)",
  ]


def test_documented_keys_are_current():
  page = paths.ROOT / "docs" / "configuration.md"
  text = page.read_text(encoding="utf-8")
  assert page_lib.fill(text) == text, (
    f"run: python -m rescalevit_jax.config {page}"
  )


@pytest.mark.parametrize(
  "patterns, count", [("data* [!d]*", 0), ("* seed", 2)], ids=["none", "twice"]
)
def test_documented_keys_appear_once(patterns, count):
  tables = [f"<!-- keys: {x} -->\n<!-- end -->" for x in patterns.split()]
  with pytest.raises(errors.UserError, match=f"is in {count} tables"):
    page_lib.fill("\n".join(tables))
