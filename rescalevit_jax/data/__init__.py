"""Datasets, from tfds to batches on the device."""
