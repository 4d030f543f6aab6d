"""Predict what a step costs on each mesh and under each scheme, and choose."""

from typing import Any

import jax
import jax.numpy as jnp

from cnn_spmd.analysis import cost, program
from cnn_spmd.analysis.cost import Card, Terms
from cnn_spmd.errors import UserError
from cnn_spmd.training import program_report


def predict(setup: Any, card: Card, one_device_seconds: float, gpus_per_host: int) -> Terms:
    """Predict a step of a Setup, which is not compiled.

    one_device_seconds: the step of one device at the same batch per device.
    Raises UserError where the closed form does not cover the network under the scheme.
    """
    moves, reason = program_report.theory_of(setup)
    if moves is None:
        raise UserError(f"parallelism={setup.config.parallelism}: has no prediction: {reason}")
    params = setup.functions.abstract_state.params
    whole = sum(leaf.size for leaf in jax.tree.leaves(params))
    own = program.bytes_per_device(params) / 4  # float32
    itemsize = jnp.dtype(setup.config.dtype).itemsize
    return cost.predict(
        card,
        one_device_seconds,
        (whole, own),
        moves,
        setup.place.mesh.shape,
        gpus_per_host,
        itemsize,
    )
