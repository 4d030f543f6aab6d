"""Reports on runs and sweeps; imports neither jax nor TFDS, so that it works on a laptop."""

from cnn_spmd.report.load import load_runs
from cnn_spmd.report.write import write_report

__all__ = ["load_runs", "write_report"]
