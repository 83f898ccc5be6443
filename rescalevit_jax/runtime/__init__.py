"""The machine and the process: accelerator, caches, command lines."""
