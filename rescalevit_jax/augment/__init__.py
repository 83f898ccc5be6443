"""Random crops, flips and colors, mixup and CutMix, on the device."""
