"""Normalise responses as AlexNet 2012 does.

Shapes: N batch, H height, W width, C channels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cnn_spmd.layers.common import FAST_FORMS
from cnn_spmd.sharding.halo import Windows


def response_norm(
    x_NHWC: jax.Array,
    *,
    size: int,
    alpha: float,
    beta: float,
    k: float,
    within_map: bool = False,
    fast_forms=FAST_FORMS,
) -> jax.Array:
    """Return x / (k + alpha * sum of x**2 over a window) ** beta, of x's dtype.

    The window is `size` neighbouring channels (Krizhevsky et al. 2012, section 3.3). within_map: it
    is size x size pixels of the same channel instead. It holds size // 2 elements before x and
    (size - 1) // 2 after, as in cuda-convnet and torch, and is clipped at the edges.

    alpha multiplies each term, as in the paper's formula. Krizhevsky's code divides its `scale` by
    the number of terms: for its settings pass alpha = scale / size, or scale / size**2 within_map.
    AlexNet's published 1e-4 is such a scale, so alpha is 2e-5 there. cuda-convnet has k = 1.
    """
    window = (1, size, size, 1) if within_map else (1, 1, 1, size)
    norm = _own_gradient_norm if "own_gradients" in fast_forms else _plain_norm
    return norm(x_NHWC, window, alpha, beta, k)


def _plain_norm(x_NHWC, window, alpha, beta, k):
    # exp(log) is several times faster than a power.
    scale = jnp.exp(-beta * jnp.log(_bases(x_NHWC, window, alpha, k)))
    return (x_NHWC * scale).astype(x_NHWC.dtype)


def _bases(x_NHWC, window, alpha, k):
    """Return k + alpha * sum of x**2 over each window, in float32 or wider."""
    return k + alpha * _window_sums(jnp.square(_wide(x_NHWC)), window)


def _window_sums(x_NHWC, window, turned=False):
    """Sum over each element's window; turned: over all elements whose windows hold it."""
    before_after = [(n // 2, (n - 1) // 2) for n in window]
    padding = [pads[::-1] if turned else pads for pads in before_after]
    return jax.lax.reduce_window(
        x_NHWC, np.zeros((), x_NHWC.dtype), jax.lax.add, window, (1, 1, 1, 1), padding
    )


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def response_norm_of_towers(
    x_NHWC: jax.Array, groups: int, place, name: str, **settings
) -> jax.Array:
    """Apply response_norm across the channels of each of `groups` towers by itself.

    AlexNet's two GPUs did so (2012, section 3.2); nothing moves between towers. settings: those of
    response_norm. name: the layer's, such as "norm1", for the placement report.
    """
    axes = place.map_axes(x_NHWC.shape[1], "group_in")
    x_NHWC = place(x_NHWC, *axes, name=f"{name} input")
    norm = functools.partial(response_norm, **settings)
    return place(place.towers(norm, groups, (x_NHWC, axes), out=axes, name=name), *axes)


def response_norm_within_map(x_NHWC: jax.Array, place, channels: str, name: str, **settings):
    """Apply response_norm within each map.

    channels: the logical axis of C. settings, name: as for response_norm_of_towers.
    """
    size, rows = settings["size"], x_NHWC.shape[1]
    axes = place.map_axes(rows, channels)
    norm = functools.partial(response_norm, within_map=True, **settings)
    if not place.splits_height(axes):
        return place(norm(x_NHWC), *axes)
    reach = Windows(rows, size, 1, size // 2, rows)
    x_NHWC = place.overlapping(place(x_NHWC, *axes, name=f"{name} input"), axes, reach, name)

    def norm_of_inner_rows(x_NHWC):
        last = x_NHWC.shape[1] - (size - 1) // 2
        return norm(x_NHWC)[:, size // 2 : last]

    x_NHWC = place.towers(norm_of_inner_rows, 1, (x_NHWC, axes), out=axes, name=name, rows=True)
    return place(x_NHWC[:, :rows], *axes)


# The fast form ("own_gradients"): its gradient keeps x alone and computes the sums again. Autodiff
# would write the sums to memory in float32 and read them back.


_own_gradient_norm = jax.custom_vjp(_plain_norm, nondiff_argnums=(1, 2, 3, 4))


def _forward(x_NHWC, *settings):
    return _own_gradient_norm(x_NHWC, *settings), x_NHWC


def _backward(window, alpha, beta, k, x_NHWC, gradient_NHWC):
    bases = _bases(x_NHWC, window, alpha, k)
    scale = jnp.exp(-beta * jnp.log(bases))
    term = (gradient_NHWC * x_NHWC * scale / bases).astype(x_NHWC.dtype)
    # Without the barrier, XLA computes the term again for each window that holds it.
    term = jax.lax.optimization_barrier(term)
    around = _window_sums(_wide(term), window, turned=True)
    return ((gradient_NHWC * scale - 2 * alpha * beta * x_NHWC * around).astype(x_NHWC.dtype),)


_own_gradient_norm.defvjp(_forward, _backward)
