"""Report on runs and sweeps.

Importing this package imports neither jax nor TFDS.
"""

from cnn_spmd.report.flat_runs import load_runs
from cnn_spmd.report.write import write_report

__all__ = ["load_runs", "write_report"]
