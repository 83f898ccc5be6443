"""Trained models: attention maps, probes, plots and published results."""
