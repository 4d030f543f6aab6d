"""Pool maps by their maximum or mean over square windows.

Shapes: N batch, H height, W width, C channels.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from cnn_spmd.layers import fast_pool, kernels, windows
from cnn_spmd.layers.activation import activate
from cnn_spmd.layers.common import LEVERS
from cnn_spmd.sharding.placement import UNPLACED


def max_pool(
    x_NHWC: jax.Array,
    window: int,
    strides: int,
    ceil: bool = False,
    *,
    place=UNPLACED,
    channels: str = "conv_out",
    levers=LEVERS,
    bias_C: jax.Array | None = None,
) -> jax.Array:
    """Return the maxima over windows; with a bias, relu(maxima + bias_C).

    Windows wider than the stride overlap (Krizhevsky et al. 2012, section 3.4).

    ceil: a last window that reaches over the edge counts, as in cuda-convnet; otherwise it is left
    out. channels: the logical axis of C. The result is placed as the input is; without this, XLA
    may gather the larger input for the next layer.

    Where maxima in a window are equal, the first gets the gradient with the lever "pool_index".
    Without it, and for windows above kernels.WIDEST, the windows' layout decides (_plain_max_pool).
    """
    axes = ("conv_batch", None, None, channels)
    if "pool_index" in levers and window <= kernels.WIDEST:
        on_shards = functools.partial(place.local, axes)
        pool = fast_pool.Pool(window, strides, ceil, x_NHWC.shape[1:3], on_shards)
        return place(fast_pool.indexed_max_pool(x_NHWC, bias_C, pool), *axes)
    x_NHWC = place(_plain_max_pool(x_NHWC, window, strides, ceil), *axes)
    if bias_C is None:
        return x_NHWC
    return place(activate(x_NHWC, bias_C, nnx.relu, levers), *axes)


def _plain_max_pool(x_NHWC: jax.Array, window: int, strides: int, ceil: bool) -> jax.Array:
    """Return the maxima over windows, in the reference form.

    Windows that tile the map are a reshape and a max: equal maxima share the gradient. Otherwise it
    is a max along each row of pixels, then one along each column.
    """
    batch, height, width, channels = x_NHWC.shape
    if window == strides and height % window == 0 and width % window == 0:
        tiles = x_NHWC.reshape(batch, height // window, window, width // window, window, channels)
        return tiles.max((2, 4))
    for dimension in (2, 1):
        taps = windows.taps(dimension, x_NHWC, window, strides, ceil)
        x_NHWC = functools.reduce(jnp.maximum, taps)
    return x_NHWC


def average_pool(x_NHWC: jax.Array, window: int, strides: int) -> jax.Array:
    """Return the means over windows in ceil mode, as in cuda-convnet.

    The sum of a window that reaches over the edge is divided by the area inside the map.
    """
    sizes = x_NHWC.shape[1:3]
    padding = [(0, windows.overhang(size, window, strides)) for size in sizes]
    sums = jax.lax.reduce_window(
        x_NHWC,
        np.zeros((), x_NHWC.dtype),
        jax.lax.add,
        (1, window, window, 1),
        (1, strides, strides, 1),
        [(0, 0), *padding, (0, 0)],
    )
    inside = [
        np.minimum(window, size - strides * np.arange(count))
        for size, count in zip(sizes, sums.shape[1:3], strict=True)
    ]
    return sums / np.outer(*inside)[None, :, :, None].astype(x_NHWC.dtype)
