"""Start many runs: configs times a grid, as processes or as a Slurm array."""
