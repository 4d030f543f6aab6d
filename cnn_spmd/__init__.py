"""Train AlexNet and its relatives on a mesh of devices.

`load_config` makes a config from an experiment. `prepare` turns it into a Setup: mesh, data,
network, step functions. `train` does a run in a folder. `load_trained` returns its newest state.
`load_runs` reads runs for analysis.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Imported at first use: reading runs needs no JAX, and launch.py sets JAX up before its import.
_API = {
    "load_config": "cnn_spmd.experiment",
    "prepare": "cnn_spmd.training.build",
    "train": "cnn_spmd.training.loop",
    "load_trained": "cnn_spmd.training.restore",
    "load_runs": "cnn_spmd.report.flat_runs",
}
__all__ = ["__version__", *_API]


def __dir__() -> list[str]:
    """Name the functions of the Python API, also before their first use."""
    return sorted({*globals(), *_API})


def __getattr__(name: str) -> Any:
    """Return a function of the Python API."""
    if name not in _API:
        raise AttributeError(f"module 'cnn_spmd' has no attribute {name!r}")
    return getattr(importlib.import_module(_API[name]), name)
