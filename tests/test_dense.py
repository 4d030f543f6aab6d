"""Dense and locally connected layers, dropout, and the marks on their parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnn_spmd.errors import UserError
from cnn_spmd.layers import conv, dense, local
from cnn_spmd.sharding.placement import UNPLACED


def test_dropout():
    x = jnp.ones((100, 1000))
    dropped = np.asarray(dense.dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(dropped)) == {0, np.float32(1 / 0.75)}
    assert abs((dropped == 0).mean() - 0.25) < 0.01
    assert dense.dropout(x, 0.25, None) is x


def test_only_dense_parameters_are_marked_dense():
    common = dict(dtype=jnp.float32, rngs=nnx.Rngs(0))
    layer = dense.dense("fc1", 4, 3, **common)
    assert [layer.kernel.part, layer.bias.part] == ["dense", "dense"]
    others = conv.conv(3, 4, 3, **common), local.Local(5, 3, 4, 3, **common)
    for other in others:
        for parameter in (other.kernel, other.bias):
            assert getattr(parameter, "part", None) is None


@pytest.mark.parametrize(("window", "zeros"), [(3, (1, 1)), (4, (1, 2))])
def test_local_against_a_plain_loop(window, zeros):
    layer = local.Local(5, 3, 4, window, dtype=jnp.float32, rngs=nnx.Rngs(0))
    assert not layer.bias[...].any()
    layer.bias[...] = jax.random.normal(jax.random.key(0), (5, 5, 4))
    kernel, bias = (np.asarray(x[...]) for x in (layer.kernel, layer.bias))
    assert (kernel.shape, bias.shape) == ((5, 5, window**2, 3, 4), (5, 5, 4))
    # He et al.: 2 / (the number of inputs of one output).
    assert kernel.std() == pytest.approx((2 / (window**2 * 3)) ** 0.5, rel=0.1)
    x = np.random.default_rng(0).normal(size=(2, 5, 5, 3)).astype(np.float32)
    padded = np.pad(x, ((0, 0), zeros, zeros, (0, 0)))
    expected = np.empty((2, 5, 5, 4), np.float32)
    for n, i, j, d in np.ndindex(expected.shape):
        inputs = padded[n, i : i + window, j : j + window]
        weights = kernel[i, j, ..., d].reshape(window, window, 3)
        expected[n, i, j, d] = (inputs * weights).sum() + bias[i, j, d]
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_the_output_layer_is_fc3():
    """Its name decides where it lives."""
    layer = dense.dense("fc2", 2, 3, dtype="float32", rngs=nnx.Rngs(0))
    message = r'dense\("fc2", ...\): is the output layer, expected dense\("fc3", ...\)'
    with pytest.raises(UserError, match=message):
        dense.logits(layer, jnp.zeros((1, 2)), UNPLACED)
