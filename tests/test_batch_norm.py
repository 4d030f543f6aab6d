"""Batch norm computes what torch's BatchNorm2d does, by NumPy; globally or per device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnn_spmd.analysis import hlo
from cnn_spmd.layers.batch_norm import BatchNorm
from cnn_spmd.sharding import mesh
from cnn_spmd.sharding.placement import UNPLACED, Placement

EPSILON, MOMENTUM = 1e-3, 0.75
SCALE, BIAS = np.float32([0.5, 1, 2]), np.float32([0, -1, 3])
X, GRADIENT = np.random.default_rng(0).normal(2.0, 3.0, (2, 16, 4, 4, 3))


def expected(x, gradient) -> dict:
    """Return what BatchNorm2d computes of one batch, its gradients, and its running averages.

    The gradient by x is that of Ioffe and Szegedy 2015, section 3.
    """
    axes, count = (0, 1, 2), x[..., 0].size
    mean, variance = x.mean(axes), x.var(axes)
    deviation = np.sqrt(variance + EPSILON)
    normal = (x - mean) / deviation
    by_normal = gradient * SCALE
    by_variance = (by_normal * (x - mean)).sum(axes) * -0.5 * deviation**-3
    by_mean = -by_normal.sum(axes) / deviation
    return dict(
        y=normal * SCALE + BIAS,
        by_x=by_normal / deviation + (by_variance * 2 * (x - mean) + by_mean) / count,
        scale=(gradient * normal).sum(axes),
        bias=gradient.sum(axes),
        mean=(1 - MOMENTUM) * mean,
        variance=MOMENTUM + (1 - MOMENTUM) * x.var(axes, ddof=1),
    )


def program(place, per_device: bool, fast_forms=(), affine: bool = True):
    """Return a function of x and the gradient by y that trains a norm for one step."""
    settings = dict(momentum=MOMENTUM, epsilon=EPSILON, affine=affine, per_device=per_device)
    layer = BatchNorm(3, **settings)
    if affine:
        layer.scale[...], layer.bias[...] = SCALE, BIAS
    graph, params, state = nnx.split(layer, nnx.Param, ...)

    def forward(params, x):
        norm = nnx.merge(graph, params, state, copy=True)
        y = norm("norm1", x, place, True, fast_forms)
        return y, nnx.state(norm, nnx.BatchStat)

    def train(x, gradient):
        y, backward, averages = jax.vjp(forward, params, x, has_aux=True)
        by_params, by_x = backward(gradient)
        return dict(y=y, by_x=by_x, **by_params, **averages)

    return train


@pytest.mark.parametrize("fast_forms", [(), ("own_gradients",)])
@pytest.mark.parametrize(("per_device", "groups"), [(False, 1), (True, 8)])
def test_one_step_on_eight_devices_against_numpy(per_device, groups, fast_forms):
    """Each group of examples has statistics of its own; running averages are their means."""
    place = Placement(mesh.make(4, 2), "data")
    with jax.enable_x64(True):
        got = jax.jit(program(place, per_device, fast_forms))(jnp.array(X), jnp.array(GRADIENT))
    each = [
        expected(*pair) for pair in zip(*(np.split(a, groups) for a in (X, GRADIENT)), strict=True)
    ]
    joins = dict(y=np.concatenate, by_x=np.concatenate, scale=np.sum, bias=np.sum)
    for name, array in got.items():
        join = joins.get(name, np.mean)
        value = join([one[name] for one in each], 0)
        np.testing.assert_allclose(array[...], value, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    ("per_device", "affine", "reduced"),
    [(False, True, 4), (False, False, 4), (True, True, 4), (True, False, 2)],
)
def test_what_devices_sum(per_device, affine, reduced):
    """Two numbers per channel in each direction; nothing that a device waits for per device."""
    place = Placement(mesh.make(4, 2), "data")
    train = program(place, per_device, ("own_gradients",), affine)
    shapes = [
        jax.ShapeDtypeStruct(
            X.shape, jnp.float32, sharding=place.sharding(("conv_batch", None, None, None), X.shape)
        )
    ] * 2
    text = jax.jit(train).lower(*shapes).compile().as_text()
    found = hlo.Module(text, place.mesh.shape).collectives()
    assert {c.operation for c in found} == {"all-reduce"}
    assert sum(c.bytes for c in found) == reduced * 3 * 4


def test_statistics_of_bfloat16_are_in_float32():
    """A mean of 4096 numbers near 1000 would be off by several in bfloat16."""
    x = (1000 + 8 * jax.random.normal(jax.random.key(0), (64, 8, 8, 3))).astype(jnp.bfloat16)
    got = program(UNPLACED, False, ("own_gradients",))(x, x)
    assert {got["y"].dtype, got["by_x"].dtype} == {jnp.dtype("bfloat16")}
    wide = np.asarray(x, np.float64)
    mean = (1 - MOMENTUM) * wide.mean((0, 1, 2))
    np.testing.assert_allclose(got["mean"][...], mean, rtol=1e-5)
    variance = MOMENTUM + (1 - MOMENTUM) * wide.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(got["variance"][...], variance, rtol=1e-2)


def test_evaluation_uses_the_running_averages():
    layer = BatchNorm(3, epsilon=EPSILON)
    layer.scale[...], layer.bias[...], layer.mean[...], layer.variance[...] = SCALE, BIAS, 1.0, 4.0
    expected = (X - 1) / np.sqrt(4 + EPSILON) * SCALE + BIAS
    np.testing.assert_allclose(layer("norm1", X.astype(np.float32)), expected, rtol=1e-5, atol=1e-5)
