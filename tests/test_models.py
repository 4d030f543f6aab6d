import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnn_spmd import models
from cnn_spmd.errors import UserError
from cnn_spmd.models import layers


def make(name, image_size, classes):
    return models.make(name, image_size=image_size, classes=classes, dropout=0.5, dtype=jnp.float32, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("name", "image_size", "classes", "count"), [
    ("alexnet", 224, 1000, 61_100_840),  # Krizhevsky 2014, as torchvision counts it
    ("alexnet", 32, 10, 35_855_178),
    ("simple_cnn", 32, 10, 3 * 3 * 3 * 32 + 32 + 16 * 16 * 32 * 10 + 10)])
def test_parameter_count_and_shapes(name, image_size, classes, count):
    model = nnx.eval_shape(lambda: make(name, image_size, classes))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == count
    logits = nnx.eval_shape(lambda model, x: model(x), model, jnp.zeros((2, image_size, image_size, 3)))
    assert logits.shape == (2, classes)


def test_every_parameter_names_its_axes():
    for name, image_size in (("alexnet", 32), ("simple_cnn", 32)):
        state = nnx.state(nnx.eval_shape(lambda name=name, size=image_size: make(name, size, 10)), nnx.Param)
        for leaf in jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)):
            assert len(leaf.axes) == leaf.ndim


@pytest.mark.parametrize(("name", "size"), [("alexnet", 31), ("simple_cnn", 31), ("lenet", 32)])
def test_refuses(name, size):
    with pytest.raises(UserError, match=r"model\.name="):
        make(name, size, 10)


@pytest.mark.parametrize(("size", "window", "strides"), [(8, 2, 2), (9, 3, 3), (9, 3, 2), (7, 2, 2)])
def test_max_pool_against_numpy(size, window, strides):
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    side = (size - window) // strides + 1
    expected, gradient = np.empty((2, side, side, 3), np.float32), np.zeros_like(x)
    for i, j in np.ndindex(side, side):
        patch = x[:, i * strides:i * strides + window, j * strides:j * strides + window]
        expected[:, i, j] = patch.max((1, 2))
        gradient[:, i * strides:i * strides + window, j * strides:j * strides + window] += (
            patch == expected[:, i, j][:, None, None])
    np.testing.assert_array_equal(layers.max_pool(x, window, strides), expected)
    np.testing.assert_array_equal(jax.grad(lambda x: layers.max_pool(x, window, strides).sum())(x), gradient)


def test_dropout():
    x = jnp.ones((100, 1000))
    dropped = np.asarray(layers.dropout(x, 0.25, jax.random.key(0)))
    assert set(np.unique(dropped)) == {0, np.float32(1 / 0.75)}
    assert abs((dropped == 0).mean() - 0.25) < 0.01
    assert layers.dropout(x, 0.25, None) is x
