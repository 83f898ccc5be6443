"""Folders that tests use."""

import pathlib

HELPERS = pathlib.Path(__file__).resolve().parent
ROOT = HELPERS.parents[1]
# Datasets and reference numbers that a user does not have.
SHARED = ROOT.parent / "shared"
