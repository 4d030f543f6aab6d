"""Pools give the numbers and gradients of their definition, in every form."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cnn_spmd.layers import fast_pool, kernels
from cnn_spmd.layers.pool import average_pool, max_pool


def window_ranges(size, window, strides, ceil):
    """Return start and end of each window along a dimension, clipped at the edge."""
    starts = [start for start in range(0, size, strides) if start + window <= size]
    if ceil and starts[-1] + window < size and starts[-1] + strides < size:
        starts.append(starts[-1] + strides)
    return [(start, min(start + window, size)) for start in starts]


@pytest.mark.parametrize("fast_forms", [(), ("pool_index",)])
@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize(
    ("size", "window", "strides"),
    [
        (8, 2, 2),
        (9, 3, 3),
        (9, 3, 2),
        (7, 2, 2),
        (8, 3, 2),
        (32, 3, 2),
        (12, 5, 2),
        (8, 2, 3),
        (9, 2, 3),
    ],
)
def test_max_pool_against_numpy(size, window, strides, ceil, fast_forms):
    x = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    ranges = window_ranges(size, window, strides, ceil)
    expected = np.empty((2, len(ranges), len(ranges), 3), np.float32)
    for i, (top, bottom) in enumerate(ranges):
        for j, (left, right) in enumerate(ranges):
            expected[:, i, j] = x[:, top:bottom, left:right].max((1, 2))
    weight = np.arange(expected.size, dtype=np.float32).reshape(expected.shape) % 7 + 1
    gradient = np.zeros_like(x)
    for (i, (top, bottom)), (j, (left, right)) in itertools.product(enumerate(ranges), repeat=2):
        largest = x[:, top:bottom, left:right] == expected[:, i, j][:, None, None]
        gradient[:, top:bottom, left:right] += largest * weight[:, i, j][:, None, None]

    @jax.jit
    def pooled_and_gradient(x):
        pooled, pull_back = jax.vjp(
            lambda x: max_pool(x, window, strides, ceil, fast_forms=fast_forms), x
        )
        return pooled, *pull_back(weight)

    for got, by_hand in zip(pooled_and_gradient(x), (expected, gradient), strict=True):
        np.testing.assert_array_equal(got, by_hand)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("size", "window", "strides"), [(32, 15, 15), (32, 16, 16), (32, 16, 8), (40, 20, 20)]
)
def test_max_pool_of_wide_windows_against_flax(size, window, strides, biased):
    """Maxima lie everywhere in the windows, also where a byte has no code for them."""
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(0), (32, size, size, 3), jnp.float64)
        bias_C = jnp.linspace(-4, 0, 3, dtype=jnp.float64)

        def ours(x, bias_C):
            return max_pool(x, window, strides, bias_C=bias_C if biased else None)

        def theirs(x, bias_C):
            largest = nnx.max_pool(x, (window, window), (strides, strides))
            return nnx.relu(largest + bias_C) if biased else largest

        got, pull = jax.vjp(ours, x, bias_C)
        expected, pull_expected = jax.vjp(theirs, x, bias_C)
        gradient = jax.random.normal(jax.random.key(1), expected.shape, jnp.float64)
        pairs = zip((got, *pull(gradient)), (expected, *pull_expected(gradient)), strict=True)
        for one, other in pairs:
            np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-12)
        assert bool((expected == 0).any()) == biased


def test_max_pool_gives_the_gradient_of_equal_maxima_to_the_first_and_keeps_nan():
    x = jnp.ones((1, 5, 5, 1))
    gradient = jax.grad(lambda x: max_pool(x, 3, 2).sum())(x)[0, :, :, 0]
    first = np.pad([[1, 0, 1], [0, 0, 0], [1, 0, 1]], ((0, 2), (0, 2)))
    np.testing.assert_array_equal(gradient, first)
    for at in np.ndindex(3, 3):
        assert jnp.isnan(max_pool(x.at[0, *at, 0].set(jnp.nan), 3, 2)[0, 0, 0, 0])


@pytest.mark.parametrize(
    ("size", "window", "strides"), [(8, 3, 2), (9, 3, 2), (32, 3, 2), (5, 2, 2), (9, 2, 3)]
)
def test_average_pool_divides_by_the_area_inside(size, window, strides):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, size, size, 3)).astype(np.float32)
    ranges = window_ranges(size, window, strides, ceil=True)
    weight = rng.normal(size=(2, len(ranges), len(ranges), 3)).astype(np.float32)
    expected, gradient = np.empty_like(weight), np.zeros_like(x)
    for i, (top, bottom) in enumerate(ranges):
        for j, (left, right) in enumerate(ranges):
            area = (bottom - top) * (right - left)
            expected[:, i, j] = x[:, top:bottom, left:right].mean((1, 2))
            gradient[:, top:bottom, left:right] += weight[:, i, j][:, None, None] / area
    np.testing.assert_allclose(average_pool(x, window, strides), expected, rtol=1e-5, atol=1e-6)
    got = jax.grad(lambda x: (average_pool(x, window, strides) * weight).sum())(x)
    np.testing.assert_allclose(got, gradient, rtol=1e-5, atol=1e-6)


@pytest.fixture
def interpreted(monkeypatch):
    """Run GPU kernels by Pallas's interpreter."""
    call = kernels.pl.pallas_call
    monkeypatch.setattr(
        kernels.pl,
        "pallas_call",
        lambda *args, compiler_params, **settings: call(*args, interpret=True, **settings),
    )


def pool_of(sizes, window, strides, ceil):
    return fast_pool.Pool(window, strides, ceil, sizes, lambda f, *arrays: f(*arrays))


def compare_kernels(pool, x, *bias):
    """Assert that both kernels give what the plain functions give; return the index."""
    expected, index = fast_pool.plain_max_and_index(pool, x, *bias)
    settings = dict(window=pool.window, strides=pool.strides)
    got = kernels.max_and_index(x, *bias, **settings, counts=pool.counts)
    np.testing.assert_array_equal(got[0], expected)
    np.testing.assert_array_equal(got[1], index)
    gradient = jax.random.normal(jax.random.key(1), expected.shape)
    by_kernel = kernels.unpool(index, gradient, **settings, sizes=pool.sizes)
    plain = fast_pool.plain_unpool(index, gradient, **settings, sizes=pool.sizes)
    np.testing.assert_allclose(by_kernel, plain, atol=1e-6)
    return index


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("bias", [(), (jnp.linspace(-3, 1, 16),)])
@pytest.mark.parametrize(
    ("sizes", "window", "strides", "ceil"),
    [((5, 9), 3, 2, False), ((7, 7), 4, 2, True)],  # of a shard of rows, and of a map
)
def test_pool_kernels_against_the_plain_form(sizes, window, strides, ceil, bias):
    x = jax.random.normal(jax.random.key(0), (2, *sizes, 16))
    index = compare_kernels(pool_of(sizes, window, strides, ceil), x, *bias)
    assert bool((index == kernels.NONE).any()) == bool(bias)


@pytest.mark.usefixtures("interpreted")
def test_pool_kernels_on_equal_maxima_nan_and_several_blocks_of_channels():
    x = jax.random.randint(jax.random.key(0), (2, 9, 9, 96), 0, 4).astype(jnp.float32)
    compare_kernels(pool_of((9, 9), 3, 2, False), x.at[0, 4, 4, ::5].set(jnp.nan))


@pytest.mark.usefixtures("interpreted")
def test_unpool_sums_in_float32():
    # All four windows chose pixel (2, 2).
    index = jnp.array([8, 6, 2, 0], jnp.uint8).reshape(1, 2, 2, 1)
    gradient = jnp.array([1, 1, 1, 256], jnp.bfloat16).reshape(1, 2, 2, 1)
    got = kernels.unpool(index, gradient, window=3, strides=2, sizes=(5, 5))
    assert got[0, 2, 2, 0] == jnp.bfloat16(259)  # one by one in bfloat16: 256
