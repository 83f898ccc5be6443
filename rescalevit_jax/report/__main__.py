"""Runs `report.main`."""

import sys

from rescalevit_jax import report

sys.exit(report.main())
