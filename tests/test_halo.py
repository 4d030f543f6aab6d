"""Rows that devices exchange where the height of maps is split."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from setups import setup_of

from cnn_spmd.analysis import hlo
from cnn_spmd.errors import UserError
from cnn_spmd.sharding import mesh
from cnn_spmd.sharding.halo import Windows
from cnn_spmd.sharding.placement import Placement

AXES = "conv_batch", "image_height", None, None


def read_rows(place: Placement, windows: Windows, fill: float):
    """Return a function of a map to the rows that each device reads, [N, devices, read, W, C]."""
    devices = place.shards("image_height")

    def read(x_NHWC):
        rows = place.overlapping(x_NHWC, AXES, windows, "conv1", fill)
        return rows.reshape(len(rows), devices, -1, *rows.shape[2:])

    return jax.jit(read)


@pytest.mark.parametrize(
    ("windows", "devices"),
    [
        (Windows(16, 3, 1, 1, 16), 4),  # as Dryden et al.: one row of each neighbour
        (Windows(16, 4, 1, 1, 16), 4),  # an even window reads more rows below
        (Windows(16, 2, 2, 0, 8), 8),  # windows that tile the map: nothing moves
        (Windows(32, 3, 2, 0, 16), 8),  # an overlapping pool in ceil mode
        (Windows(224, 11, 4, 2, 55), 4),  # AlexNet at 224 pixels, layer by layer
        (Windows(55, 3, 2, 0, 27), 8),
        (Windows(27, 5, 1, 2, 27), 4),
        (Windows(27, 3, 2, 0, 13), 2),
        (Windows(13, 3, 2, 0, 6), 4),
        (Windows(30, 3, 2, 1, 15), 2),
    ],
)
def test_each_device_gets_the_rows_that_its_windows_read(windows, devices):
    """Also where rows do not divide; gradients go back to the rows that they are of."""
    place = Placement(mesh.make(1, devices), "spatial")
    x = 1.0 + np.arange(2 * windows.rows, dtype=np.float32).reshape(2, windows.rows, 1, 1)
    read = read_rows(place, windows, fill=-np.inf)
    got = read(x)
    computed = -(-windows.count // devices)
    gradient, weights = np.zeros_like(x), np.zeros(got.shape, np.float32)
    for window in range(windows.count):
        device, place_in_shard = divmod(window, computed)
        for row in range(windows.size):
            at, source = place_in_shard * windows.strides + row, 0
            source = window * windows.strides - windows.before + row
            inside = 0 <= source < windows.rows
            expected = x[:, source] if inside else np.full((2, 1, 1), -np.inf)
            np.testing.assert_array_equal(got[:, device, at], expected)
            if inside and not weights[0, device, at, 0, 0]:
                weights[:, device, at] = window + 1
                gradient[:, source] += window + 1

    def weighted(x):
        rows = read(x)
        return jnp.where(weights > 0, rows * weights, 0).sum()

    np.testing.assert_array_equal(jax.grad(weighted)(x), gradient)


def test_a_halo_that_is_larger_than_a_shard():
    """A 5x5 window reads two rows of each side, where each device has one."""
    place = Placement(mesh.make(1, 8), "spatial")
    message = (
        r"^conv1: windows of 5 rows on maps of 8 rows read more rows than the neighbours hold on 8 "
        r"devices along mesh axis model \(mesh 1x8, parallelism=spatial\): "
        r"expected 1 or 2 or 4 devices along model, or more than 8, which split examples instead"
    )
    with pytest.raises(UserError, match=message):
        read_rows(place, Windows(8, 5, 1, 2, 8), 0.0)(jnp.zeros((1, 8, 8, 3)))


def test_batch_norm_per_device_is_refused():
    changes = dict(dtype="float32", model=dict(batch_norm="per_device"))
    setup = setup_of("resnet_20", "spatial", (2, 2), **changes)
    with pytest.raises(UserError, match="splits the height of the maps that norm1 normalises"):
        setup.activations  # noqa: B018


def test_crops_and_views_are_cut_without_moving_anything():
    """Evaluation moves the halo of conv1, and then rows for examples."""
    changes = dict(dtype="float32", data=dict(crop=24), eval=dict(views="ten"))
    setup = setup_of("simple_cnn", "spatial", (2, 4), **changes)
    text = setup.lower_evaluation().compile().as_text()
    found = hlo.Module(text, dict(setup.place.mesh.shape)).collectives()
    moved = {(c.operation, c.axes) for c in found if c.bytes > 100}
    assert moved == {("collective-permute", ("model",)), ("all-to-all", ("model",))}
    moved = {(row["kind"], *row["axes"]) for row in setup.report()["communication"]}
    gradients = ("reduce", "data", "model"), ("reduce", "data"), ("reduce", "model")
    assert moved == {("collective-permute", "model"), ("all-to-all", "model"), *gradients}
