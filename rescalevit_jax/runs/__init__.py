"""The folder of a run: config, metrics, checkpoints and result."""
