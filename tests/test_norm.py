"""The response norm is the published formula, and stays within a tower."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cnn_spmd.layers.norm import response_norm, response_norm_of_towers
from cnn_spmd.sharding.placement import UNPLACED


@pytest.mark.parametrize("within_map", [False, True])
@pytest.mark.parametrize(
    ("size", "alpha", "beta", "k"), [(5, 2e-5, 0.75, 2.0), (4, 0.3, 0.75, 1.0), (3, 0.5, 0.5, 1.5)]
)
def test_response_norm_against_numpy(size, alpha, beta, k, within_map):
    """Compare with loops over AlexNet 2012's formula (section 3.3) and its derivative.

    The paper's window reaches n/2 to both sides. For an even n it holds n elements as cuda-convnet
    and torch have it: n/2 before, n/2 - 1 after.
    """
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 2, 6, 5, 7))

    def window(at, end):
        first = at - size // 2
        return range(max(0, first), min(end, first + size))

    def neighbours(i, j, c):
        if within_map:
            return [(a, b, c) for a in window(i, 6) for b in window(j, 5)]
        return [(i, j, d) for d in window(c, 7)]

    expected, gradient = np.empty_like(x), np.zeros_like(x)
    for n, i, j, c in np.ndindex(x.shape):
        base = k + alpha * sum(x[n][at] ** 2 for at in neighbours(i, j, c))
        expected[n, i, j, c] = x[n, i, j, c] / base**beta
        gradient[n, i, j, c] += weight[n, i, j, c] / base**beta
        slope = weight[n, i, j, c] * x[n, i, j, c] * beta * base ** (-beta - 1) * 2 * alpha
        for at in neighbours(i, j, c):
            gradient[n][at] -= slope * x[n][at]

    def norm(x, fast_forms):
        settings = dict(size=size, alpha=alpha, beta=beta, k=k, within_map=within_map)
        return response_norm(x, **settings, fast_forms=fast_forms)

    x = x.astype(np.float32)
    for fast_forms in ((), ("own_gradients",)):
        np.testing.assert_allclose(norm(x, fast_forms), expected, rtol=1e-5, atol=1e-6)
        got = jax.grad(lambda x, fast_forms=fast_forms: (norm(x, fast_forms) * weight).sum())(x)
        np.testing.assert_allclose(got, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("within_map", [False, True])
def test_response_norm_of_bfloat16_is_computed_in_float32(within_map):
    x = jax.random.normal(jax.random.key(0), (2, 5, 5, 8), jnp.bfloat16)
    settings = dict(size=5, alpha=1.0, beta=0.75, k=1.0, within_map=within_map)
    norm = functools.partial(response_norm, **settings)
    got, gradient = jax.vjp(norm, x)
    assert {got.dtype, gradient(x)[0].dtype} == {jnp.dtype("bfloat16")}
    np.testing.assert_array_equal(got, norm(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_norms_of_towers_do_not_see_each_other():
    x = np.random.default_rng(0).normal(size=(1, 5, 5, 96)).astype(np.float32)
    other = np.concatenate([x[..., :48], 2 * x[..., 48:]], -1)
    settings = dict(size=5, alpha=1.0, beta=0.75, k=2.0)
    a, b = (response_norm_of_towers(x, 2, UNPLACED, "norm1", **settings) for x in (x, other))
    np.testing.assert_array_equal(a[..., :48], b[..., :48])
    assert not np.array_equal(a[..., 48:], b[..., 48:])
