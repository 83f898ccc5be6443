"""Fast paths of the model, with gradients written out; see `tests`."""
