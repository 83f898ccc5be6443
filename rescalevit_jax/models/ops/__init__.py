"""Fast operations of the model, with hand-written gradients."""
