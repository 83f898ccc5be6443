"""Measure speed against peers; compile for GPUs that are not here."""
