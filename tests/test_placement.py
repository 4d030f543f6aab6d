"""Rows of the placement table on meshes: where arrays lie, and what is refused."""

import ast
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from setups import (
    narrow,  # noqa: F401  (a fixture)
    setup_of,
)

from cnn_spmd.analysis import program
from cnn_spmd.errors import UserError
from cnn_spmd.sharding import mesh
from cnn_spmd.sharding.placement import Placement
from cnn_spmd.sharding.table import TABLE


def own_placement(shape: tuple[int, ...], **row) -> Placement:
    """Return the placement of a scheme with this row of a config's own."""
    return Placement(mesh.make(*shape), "mine", dict(mine=row))


# ---- Sizes that do not divide.


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (
            (("conv_batch",), (100,), "batch_size"),
            "batch_size=100 does not divide by the 8 devices of mesh axes data and model (mesh 4x2,"
            " parallelism=hybrid): expected a batch that is a multiple of 8, such as 96 or 104, or "
            "another mesh",
        ),
        (
            (("dense_batch", "fc1_in"), (3, 8), "fc1 input"),
            "fc1 input (3, 8): dense_batch=3 does not divide by the 4 devices of mesh axis data "
            "(mesh 4x2, parallelism=hybrid): expected a batch that is a multiple of 4, such as 4, "
            "or another mesh",
        ),
        (
            (("fc1_out",), (9,), "fc1.bias"),
            "fc1.bias (9,): fc1_out=9 does not divide by the 2 devices of mesh axis model (mesh "
            "4x2, parallelism=hybrid): change the mesh or the parallelism",
        ),
    ],
)
def test_what_to_change_where_a_size_does_not_divide(array, message):
    with pytest.raises(UserError) as refused:
        Placement(mesh.make(4, 2), "hybrid").spec(*array)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("model", "parallelism", "shape", "message"),
    [
        (
            "alexnet_2012",
            "two_tower",
            (2, 4),
            "its 2 towers do not divide by the 4 devices of mesh axis model",
        ),
        ("alexnet_2012", "model", (1, 3), r"batch|conv\d.* does not divide by the 3 devices"),
        ("alexnet", "hybrid", (1, 3), "does not divide by the 3 devices"),
    ],
)
def test_networks_that_do_not_divide(model, parallelism, shape, message):
    with jax.enable_x64(True), pytest.raises(UserError, match=message):
        setup = setup_of(model, parallelism, shape, batch_size=math.prod(shape) * 2)
        setup.activations  # noqa: B018
        setup.functions.abstract_state  # noqa: B018


def test_the_report_says_what_is_replicated():
    place = Placement(mesh.make(2, 4), "model")
    note = place.report("fc3.bias", ("fc3_out",), (10,), 4)["note"]
    assert note == "fc3_out=10 does not divide by model=4: replicated"
    assert place.report("fc3.bias", ("fc3_out",), (12,), 4)["note"] == ""


# ---- Rows of a config's own.


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (dict(mine=dict(fc9_out="model")), r"placement\.mine\.fc9_out=model: no such logical axis"),
        (
            dict(mine=dict(fc1_out="rows")),
            r"placement\.mine\.fc1_out=rows: expected 'data', 'model'",
        ),
        (dict(mine=dict(conv_batch=("data", "data"))), r"placement\.mine\.conv_batch="),
        (dict(mine=dict(conv_batch=3)), r"placement\.mine\.conv_batch=3: expected 'data', 'model'"),
        (dict(mine=3), r"placement\.mine=3: expected a row such as"),
        (dict(data=dict(fc1_out="model")), r"placement\.data: is a built-in row"),
        (
            dict(mine=dict(base="fdsp")),
            r"placement\.mine\.base=fdsp: unknown, expected one of data,",
        ),
        (dict(mine=dict(base=["fsdp"])), r"placement\.mine\.base=\['fsdp'\]: unknown, expected"),
        (dict(other={}), "parallelism=mine: unknown, expected one of data, .*, other"),
    ],
)
def test_own_rows_that_are_refused(own, message):
    with pytest.raises(UserError, match=message):
        Placement(mesh.make(4, 2), "mine" if "data" not in own else "data", own)


@pytest.mark.parametrize(
    ("row", "shared", "instead"),
    [
        (dict(fc1_in="model", dense_batch="model"), "mesh axis model", "None"),
        (dict(fc1_in="model", base="data"), "mesh axis model", "'data'"),
        (dict(fc1_in="ALL", base="data"), "mesh axes data and model", "None"),
    ],
)
def test_two_dimensions_on_one_mesh_axis(row, shared, instead):
    """What the message suggests works."""
    array = (("dense_batch", "fc1_in"), (8, 8), "fc1 input")
    with pytest.raises(UserError) as refused:
        own_placement((4, 2), **row).spec(*array)
    assert str(refused.value) == (
        f"fc1 input (8, 8): dense_batch and fc1_in are both split over {shared} (mesh 4x2, "
        f"parallelism=mine): expected only one of them to be, such as dense_batch={instead}"
    )
    own_placement((4, 2), **row | dict(dense_batch=ast.literal_eval(instead))).spec(*array)


def test_a_logical_axis_that_there_is_not():
    place = own_placement((4, 2))
    with pytest.raises(UserError, match="no such logical axis 'fc4_in'"):
        place.spec(("fc4_in",), (8,), "fc4.kernel")


def test_a_row_starts_from_its_base():
    """Its entries replace those of the base; "ALL" stands for all mesh axes."""
    place = own_placement((4, 2), base="fsdp", dense_batch="data", output_batch=None)
    expected = TABLE["fsdp"] | dict(dense_batch="data", output_batch=None)
    assert place.row == expected
    at_rest = dict(fc1_in="ALL", fc1_out=None)
    place = own_placement((4, 2), base="fsdp", at_rest=at_rest, conv_in="ALL", gather_again=False)
    at_rest = dict(fc1_in=("data", "model"), fc1_out=None)
    changed = dict(at_rest=at_rest, conv_in=("data", "model"), gather_again=False)
    assert place.row == TABLE["fsdp"] | changed


def test_a_row_from_json_and_its_report():
    """JSON has lists where a config has tuples."""
    place = own_placement((4, 2), conv_batch=["data", "model"])
    report = place.report("x", ("conv_batch", "fc1_out"), (8, 4), 4)
    assert report["mesh_axes"] == [["data", "model"], None]


# ---- States.


def test_parameters_without_axes_are_replicated():
    """So are arrays that are not variables; one with axes lies where the row says."""
    place = Placement(mesh.make(4, 2), "hybrid")
    state = dict(
        step=jnp.zeros((), jnp.int32),
        plain=nnx.Param(jnp.zeros((8, 8))),
        fc1=nnx.Param(jnp.zeros((8, 8)), axes=("fc1_in", "fc1_out")),
    )
    shardings = place.of_state(state)
    assert shardings["step"].is_fully_replicated
    assert shardings["plain"].get_value().is_fully_replicated
    assert shardings["fc1"].get_value().spec == P(None, "model")
    on_devices = jax.device_put(state, shardings)
    assert on_devices["plain"][...].addressable_shards[0].data.shape == (8, 8)
    assert on_devices["fc1"][...].addressable_shards[0].data.shape == (8, 4)


# ---- Micro-batches.


@pytest.mark.parametrize(
    ("parallelism", "axis"), [("data", "conv_batch"), ("hybrid", "dense_batch")]
)
def test_micro_batches_and_back_move_nothing(parallelism, axis):
    """Example i is in micro-batch i % count; whole_batch is the inverse."""
    place = Placement(mesh.make(4, 2), parallelism)
    x_BF = np.arange(16 * 3.0).reshape(16, 3)
    on_devices = jax.device_put(x_BF, place.sharding((axis, None), x_BF.shape))

    def split(x_BF):
        return place.micro_batches(x_BF, 2, axis, None)

    def split_and_join(x_BF):
        return place.whole_batch(split(x_BF) * 2, axis, None)

    for f, expected in (
        (split, np.stack([x_BF[0::2], x_BF[1::2]])),
        (split_and_join, x_BF * 2),
    ):
        compiled = jax.jit(f).lower(on_devices).compile()
        np.testing.assert_array_equal(compiled(on_devices), expected)
        assert program.report(compiled, place.mesh, 1)["collectives"] == []


# ---- Towers.


def placed_towers(place: Placement, inputs: str | None, batch: int) -> None:
    """Place the two towers of a layer called conv2, on maps of 12 channels."""
    place.towers(
        lambda x: x,
        2,
        (jnp.zeros((batch, 4, 4, 12)), ("conv_batch", None, None, inputs)),
        out=("conv_batch", None, None, "group_out"),
        name="conv2",
    )


def test_towers_that_do_not_divide():
    place = Placement(mesh.make(1, 3), "model")
    with pytest.raises(UserError, match="conv2: its 2 towers do not divide by the 3 devices"):
        placed_towers(place, None, batch=1)


def test_towers_of_a_row_that_splits_two_dimensions_over_one_mesh_axis():
    place = own_placement((2, 2), conv_batch=("data", "model"), group_out="model")
    message = r"conv2 .*: conv_batch and group_out are both split over mesh axis model"
    with pytest.raises(UserError, match=message):
        placed_towers(place, None, batch=4)


def test_towers_that_leave_on_another_mesh_axis_than_they_come():
    place = own_placement((2, 2), group_in="model", group_out="data")
    message = r"conv2: group_in=model and group_out=data .*: expected the same"
    with pytest.raises(UserError, match=message):
        placed_towers(place, "group_in", batch=4)
