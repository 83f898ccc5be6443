"""Weights in .npz files: read, detect, plan, load, save and fold."""
