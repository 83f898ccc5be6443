"""Optimizers, schedules, clipping, loss scaling and averages of weights."""
