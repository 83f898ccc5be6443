"""Measure speed against peers; compile for absent GPUs."""
