"""The training of a run, from initial state to last evaluation."""
