"""Learning-rate schedule, clipping, optimizers, loss scaling and EMA."""
