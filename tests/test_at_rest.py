"""Weights at rest: where they lie between steps, and when the layers gather them."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.extend.core import Literal
from jax.sharding import PartitionSpec as P
from setups import (
    narrow,  # noqa: F401  (a fixture)
    setup_of,
)

from cnn_spmd.errors import UserError
from cnn_spmd.sharding import mesh
from cnn_spmd.sharding.placement import Placement
from cnn_spmd.sharding.table import KERNELS, TABLE

BOTH = ("data", "model")
CONV, FC1 = (None, None, "conv_in", "conv_out"), ("fc1_in", "fc1_out")


@pytest.mark.parametrize(
    ("row", "axes", "shape", "spec", "note"),
    [
        ("sharded_update", CONV, (3, 3, 4, 16), P(None, None, None, BOTH), ""),
        ("sharded_update", FC1, (64, 10), P(BOTH, None), ""),
        ("sharded_update", ("conv_out",), (16,), P(None), ""),
        ("sharded_update", FC1, (12, 8), P("data", None), "split over data"),
        ("sharded_update", FC1, (6, 8), P("model", None), "split over model"),
        ("sharded_update", FC1, (5, 8), P(None, None), "replicated"),
        # In use the rows are whole and the columns split: at rest the rows are split by the rest.
        (dict(TABLE["hybrid"], at_rest=KERNELS), FC1, (64, 16), P("data", "model"), ""),
        # Shards of a shard in use: a device gathers neighbours.
        (dict(fc1_in="model", at_rest=KERNELS), FC1, (64, 16), P(("model", "data"), None), ""),
        (dict(at_rest=dict(fc1_out="model")), FC1, (64, 16), P(None, "model"), ""),
        (dict(fc1_in="data", at_rest={}), FC1, (64, 16), P("data", None), ""),
    ],
)
def test_where_a_weight_lies_at_rest(row, axes, shape, spec, note):
    """Sizes that do not divide are split over fewer devices, and the report says so."""
    named = isinstance(row, str)
    place = Placement(mesh.make(4, 2), row if named else "mine", {} if named else dict(mine=row))
    assert place.spec_at_rest(axes, shape) == spec
    report = place.report("weight", axes, shape, 4, weight=True)
    reason = f"fc1_in={shape[0]} does not divide by data+model=8: {note}"
    assert report["note"] == (reason if note else "")
    held = jax.device_put(jnp.zeros(shape), place.sharding_at_rest(axes, shape))
    assert report["bytes_per_device"] == held.addressable_shards[0].data.nbytes
    assert place.report("map", axes, shape, 4)["note"] == ""


def test_only_weights_have_a_place_at_rest():
    place = Placement(mesh.make(4, 2), "fsdp")
    array = jnp.zeros((8, 8))
    state = [kind(array, axes=("fc1_in", "conv_out")) for kind in (nnx.Param, nnx.BatchStat)]
    weight, average = (each.get_value().spec for each in place.of_state(state))
    assert (weight, average) == (P(BOTH, None), P(None, None))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (dict(at_rest=3), "at_rest=3: expected a row of weights such as {'fc1_in': 'data'}"),
        (dict(at_rest=dict(fc1_in="rows")), "at_rest.fc1_in=rows: expected 'data', 'model'"),
        (dict(at_rest=dict(fc9_in="data")), "at_rest.fc9_in=data: no such logical axis"),
        (dict(at_rest=dict(conv_batch="data")), "at_rest.conv_batch=data: no such logical axis"),
        (dict(at_rest=dict(at_rest={})), "at_rest.at_rest={}: no such logical axis"),
        (dict(gather_again=True), "gather_again=True: expected True or False, in a row with at_re"),
        (dict(at_rest={}, gather_again=1), "gather_again=1: expected True or False"),
    ],
)
def test_own_rows_that_are_refused(row, message):
    with pytest.raises(UserError) as error:
        Placement(mesh.make(4, 2), "mine", dict(mine=row))
    assert str(error.value).startswith(f"placement.mine.{message}")


def moves(parallelism: str, dtype: str) -> list[tuple]:
    """Return (dtype, the moves that it waits for) of each move of a kernel or its gradient.

    In a gradient of AlexNet, in order. A move is a constraint on where such an array lies. A gather
    has two: where the kernel rests, and where it is used.
    """
    setup = setup_of("alexnet", parallelism, (4, 2), dtype=dtype)
    functions, state = setup.functions, setup.functions.abstract_state
    inputs = setup.feeds[0].shapes(setup.config.batch_size)
    kernels = [leaf.shape for leaf in jax.tree.leaves(state.params) if leaf.ndim > 1]
    found, waits = [], {}
    for equation in jax.make_jaxpr(functions.gradients)(state, *inputs).jaxpr.eqns:
        known = [variable for variable in equation.invars if not isinstance(variable, Literal)]
        before = frozenset().union(*(waits.get(variable, ()) for variable in known))
        result = equation.outvars[0].aval
        if equation.primitive.name == "sharding_constraint" and result.shape in kernels:
            found.append((str(result.dtype), before))
            before |= {len(found) - 1}
        waits |= dict.fromkeys(equation.outvars, before)
    return found


def test_fsdp_moves_one_layer_after_another():
    """Each move waits for all moves before it, forward and backward.

    That is 2 per layer forward and 3 backward: the gather and the sum of the gradient. With
    sharded_update no gather waits for another one. What moves has the compute dtype.
    """
    assert moves("fsdp", "float32") == [("float32", frozenset(range(n))) for n in range(8 * 5)]
    found = moves("sharded_update", "bfloat16")
    in_pairs = [("bfloat16", frozenset({n - 1} if n % 2 else ())) for n in range(8 * 2)]
    assert found[: 8 * 2] == in_pairs
    assert len(found) == 8 * 3
