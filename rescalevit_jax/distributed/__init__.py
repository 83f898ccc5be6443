"""Several devices and several processes in one run."""
