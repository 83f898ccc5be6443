"""Analyze models: attention maps, probes, plots, published results."""
