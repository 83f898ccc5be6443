"""Compare many runs: tables, one HTML page, studies of learning rates."""
