"""Augmentation on the device: crop, flip, color operations, mixup, CutMix."""
