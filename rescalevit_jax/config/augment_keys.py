"""Config keys of the augmentation."""

from rescalevit_jax.augment import preprocess
from rescalevit_jax.augment import rand_augment
from rescalevit_jax.config import key

KEYS = {
  "mixup": key.nonnegative(0.0, "alpha of mixup; 0: no mixup"),
  "cutmix": key.nonnegative(
    0.0,
    "alpha of CutMix; with mixup, each image gets one of the two; 0: none",
  ),
  "augment.crop": key.Key(True, "random crop in training (RandomResizedCrop)"),
  "augment.min_area": key.positive_up_to_one(
    0.05, "minimum area of a crop as a fraction of the image"
  ),
  "augment.min_aspect": key.Key(
    0.75,
    "minimum aspect ratio width / height of a crop; the maximum is its inverse",
    "in [0.01, 1]",
    lambda x: 0.01 <= x <= 1,
  ),
  "augment.flip": key.Key(
    False, "flip training images horizontally with probability 0.5"
  ),
  "augment.pad_crop": key.nonnegative(
    0,
    "maximum random shift in pixels, with black padding, instead of"
    " `augment.crop`; 0: none",
  ),
  "augment.auto": key.Key(
    "none",
    "automatic augmentation before the crop; `trivial`: TrivialAugment, one"
    " random operation; `rand`: RandAugment",
    preprocess.AUTO,
  ),
  "augment.rand_ops": key.positive(2, "number of operations of RandAugment"),
  "augment.rand_magnitude": key.Key(
    9.0,
    "mean magnitude of the operations of RandAugment",
    "in [0, 10]",
    lambda x: 0 <= x <= rand_augment.MAX_MAGNITUDE,
  ),
  "augment.color_jitter": key.up_to_one(
    0.0,
    "maximum relative change of brightness, contrast and saturation, such as"
    " 0.3; 0: none",
  ),
  "augment.random_erasing": key.up_to_one(
    0.0, "probability of random erasing, which replaces a box by noise"
  ),
}
