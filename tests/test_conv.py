"""Each fast form of a convolution gives the reference form's numbers, and is used."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnn_spmd import models
from cnn_spmd.errors import UserError
from cnn_spmd.layers import activation, common, fast_conv
from cnn_spmd.layers.conv import apply, conv, conv_relu
from cnn_spmd.models import alexnet, alexnet_2012
from cnn_spmd.sharding.placement import UNPLACED
from experiments import alexnet_cifar

# "carry_bf16" is no form of a layer: see tests/test_carry_bf16.py.
FORMS = ("space_to_depth", "pool_first", "pool_index", "column_groups", "own_gradients")


def build(*sizes, **settings):
    return conv(*sizes, dtype=jnp.float32, rngs=nnx.Rngs(0), **settings)


def grouped_layer():
    """Return conv2 of AlexNet 2012: two towers of 48 channels."""
    return build(96, 256, 5, groups=2)


def test_towers_do_not_see_each_other():
    layer = grouped_layer()
    x = np.random.default_rng(0).normal(size=(1, 5, 5, 96)).astype(np.float32)
    other = np.concatenate([x[..., :48], -x[..., 48:]], -1)
    a, b = (np.asarray(conv_relu("conv2", layer, x, UNPLACED)) for x in (x, other))
    np.testing.assert_array_equal(a[..., :128], b[..., :128])
    assert not np.array_equal(a[..., 128:], b[..., 128:])


def test_grouped_convolution_against_xla():
    layer = grouped_layer()
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 96)).astype(np.float32)
    got = conv_relu("conv2", layer, x, UNPLACED)
    np.testing.assert_allclose(got, nnx.relu(layer(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", [None, dict(window=2, strides=2)])
@pytest.mark.parametrize("fast_forms", [(), common.FAST_FORMS])
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_with_and_without_bias_against_flax(groups, use_bias, fast_forms, pool):
    layer = build(4, 6, 3, groups=groups, use_bias=use_bias, bias_init=common.ONES)
    x = jax.random.normal(jax.random.key(0), (2, 9, 9, 4))
    got = apply("conv1", layer, x, UNPLACED, fast_forms)
    np.testing.assert_allclose(got, layer(x), rtol=1e-5, atol=1e-5)
    expected = nnx.relu(layer(x))
    if pool:
        expected = nnx.max_pool(expected, (2, 2), (2, 2))
    got = conv_relu("conv1", layer, x, UNPLACED, fast_forms, pool)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@functools.cache
def value_and_gradient(name, size, fast_forms):
    """Return the logits' square sum and its gradient by each parameter, in float64."""
    settings = dict(image_size=size, classes=5, width=16, dropout=0.0, dtype=jnp.float64)
    with jax.enable_x64(True):
        model = models.make(name, **settings, fast_forms=fast_forms, rngs=nnx.Rngs(0))
        graph, params = nnx.split(model)
        x = jax.random.normal(jax.random.key(0), (2, size, size, 3), jnp.float64)

        def value(params):
            model = nnx.merge(graph, params)
            return (model.classify(model.features(x)) ** 2).sum()

        leaves = jax.tree.leaves(jax.jit(jax.value_and_grad(value))(params))
        return [np.asarray(leaf) for leaf in leaves]


def assert_same(name, size, fast_forms):
    """Assert that `fast_forms` change no number.

    The network computes in float64, but parameters and their gradients are float32.
    """
    plain, fast = value_and_gradient(name, size, ()), value_and_gradient(name, size, fast_forms)
    for one, other in zip(fast, plain, strict=True):
        assert np.abs(one - other).max() < 1e-7 * np.abs(other).max()


@pytest.fixture
def narrow(monkeypatch):
    """Give both AlexNets few channels."""
    monkeypatch.setattr(alexnet, "CHANNELS", (8, 16, 24, 16, 16))
    monkeypatch.setattr(alexnet_2012, "CHANNELS", (16, 32, 24, 32, 16))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    ("name", "size", "form"),
    [
        *(("alexnet", 224, form) for form in FORMS),
        *(("alexnet", 32, form) for form in FORMS[1:]),
        ("alexnet_2012", 70, "space_to_depth"),
        ("alexnet_2012", 70, "own_gradients"),
        ("cuda_convnet_18pct", 32, "own_gradients"),
    ],
)
def test_fast_forms_change_nothing(name, size, form):
    assert_same(name, size, ("space_to_depth", form))


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("size", [32, 224])
def test_all_fast_forms_together_change_nothing(size):
    assert_same("alexnet", size, common.FAST_FORMS)


def test_a_fast_form_is_used():
    """Each changes the program where it can.

    Otherwise the tests above would compare like with like.
    """
    settings = dict(image_size=224, classes=5, width=16, dropout=0.0, dtype=jnp.float32)

    def program(fast_forms):
        model = nnx.eval_shape(
            lambda: models.make("alexnet", **settings, fast_forms=fast_forms, rngs=nnx.Rngs(0))
        )
        graph, params = nnx.split(model)
        gradient = jax.grad(lambda params, x: nnx.merge(graph, params).features(x).sum())
        return str(jax.make_jaxpr(gradient)(params, jnp.zeros((1, 224, 224, 3))))

    assert len({program(FORMS[:used]) for used in range(len(FORMS) + 1)}) == len(FORMS) + 1
    assert alexnet_cifar.get_config().model.fast  # a run takes them all
    with pytest.raises(UserError, match="fast_forms=magic: unknown"):
        models.make("alexnet", fast_forms=("magic",))


@pytest.mark.parametrize(
    "pool",
    [
        None,
        dict(window=3, strides=2),
        dict(window=3, strides=2, ceil=True),
        dict(window=2, strides=3),
    ],
)
@pytest.mark.parametrize(
    ("size", "window", "strides"), [(20, 3, 1), (21, 5, 1), (27, 5, 4), (31, 5, 4)]
)
def test_groups_of_columns_leave_nothing_in_the_map(size, window, strides, pool):
    """The last group of columns reaches over the map's edge; no pool sees that."""
    layer = build(3, 4, window, strides=strides, bias_init=common.ONES)
    x = jax.random.normal(jax.random.key(0), (2, size, size, 3))

    def value(layer, fast_forms):
        return (conv_relu("conv1", layer, x, UNPLACED, fast_forms, pool) ** 2).sum()

    plain, fast = (
        nnx.jit(nnx.value_and_grad(functools.partial(value, fast_forms=fast_forms)))(layer)
        for fast_forms in ((), common.FAST_FORMS)
    )
    for one, other in zip(jax.tree.leaves(fast), jax.tree.leaves(plain), strict=True):
        assert np.abs(one - other).max() < 1e-5 * np.abs(other).max()


@pytest.mark.parametrize(
    ("size", "window", "channels", "grouped"),
    [(32, 3, 3, True), (27, 5, 64, True), (27, 5, 65, False), (28, 5, 64, False)],
)
def test_where_columns_are_grouped(size, window, channels, grouped):
    """For images, and for the gradient by up to 64 maps of odd width."""
    layer = build(channels, 4, window)

    def program(fast_forms):
        gradient = jax.grad(lambda x: conv_relu("conv1", layer, x, UNPLACED, fast_forms).sum())
        return str(jax.make_jaxpr(gradient)(jnp.zeros((1, size, size, channels))))

    assert (program(("space_to_depth", "column_groups")) != program(())) == grouped


def test_pool_first_adds_the_bias_after_the_pool(monkeypatch):
    seen, layer = [], build(3, 4, 3)
    monkeypatch.setattr(activation, "bias_relu", lambda x, bias_C: seen.append(x.shape[1:3]) or x)
    x, pool = jnp.zeros((1, 8, 8, 3)), dict(window=2, strides=2)
    for fast_forms in (("own_gradients", "pool_first"), ("own_gradients",)):
        conv_relu("conv1", layer, x, UNPLACED, fast_forms, pool)
    assert seen == [(4, 4), (8, 8)]


@pytest.mark.parametrize(
    ("size", "window", "padding"), [(27, 5, (2, 2)), (9, 4, (1, 2)), (7, 3, (0, 0))]
)
def test_gradient_in_pairs(size, window, padding):
    """Two columns at a time give autodiff's gradients, in float64."""
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (2, size, size, 6), jnp.float64)
        kernel = jax.random.normal(jax.random.key(1), (window, window, 6, 10), jnp.float64)
        expected, plain = jax.vjp(lambda *at: common.convolve(*at, [padding] * 2), x, kernel)
        got, paired = jax.vjp(lambda *at: fast_conv.paired_gradient(*at, padding), x, kernel)
        gradient = jax.random.normal(jax.random.key(2), got.shape, jnp.float64)
        for one, other in zip((got, *paired(gradient)), (expected, *plain(gradient)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)
