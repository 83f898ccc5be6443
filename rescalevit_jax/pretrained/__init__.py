"""Weights in .npz files: detect, transfer, load, save and fold."""
