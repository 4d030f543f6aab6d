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
from cnn_spmd.layers.common import FAST_FORMS
from cnn_spmd.sharding.halo import Windows
from cnn_spmd.sharding.placement import UNPLACED


def max_pool(
    x_NHWC: jax.Array,
    window: int,
    strides: int,
    ceil: bool = False,
    *,
    place=UNPLACED,
    channels: str = "conv_out",
    fast_forms=FAST_FORMS,
    bias_C: jax.Array | None = None,
    name: str = "pool",
) -> jax.Array:
    """Return the maxima over windows; with a bias, relu(maxima + bias_C).

    Windows wider than the stride overlap (Krizhevsky et al. 2012, section 3.4).

    ceil: a last window that reaches over the edge counts, as in cuda-convnet; otherwise it is left
    out. channels: the logical axis of C. The result is placed as the input is; without this, XLA
    may gather the larger input for the next layer. name: the layer's, for the placement report.

    Where maxima in a window are equal, the first gets the gradient with the fast form "pool_index".
    Without it, and for windows above kernels.WIDEST, the windows' layout decides (_plain_max_pool).
    """
    count = windows.count(x_NHWC.shape[1], window, strides, ceil)
    reach = Windows(x_NHWC.shape[1], window, strides, 0, count)
    x_NHWC, axes = _with_halo(x_NHWC, reach, place, channels, name, fill=-np.inf)
    if "pool_index" in fast_forms and window <= kernels.WIDEST:
        on_shards = functools.partial(place.local, axes)
        sizes = x_NHWC.shape[1] // place.shards(axes[1]), x_NHWC.shape[2]  # on each device
        pool = fast_pool.Pool(window, strides, ceil, sizes, on_shards)
        x_NHWC = fast_pool.indexed_max_pool(x_NHWC, bias_C, pool)[:, :count]
        return place(x_NHWC, *axes, name=_output_name(name, place))
    plain = functools.partial(_plain_max_pool, window=window, strides=strides, ceil=ceil)
    rows = place.splits_height(axes)
    x_NHWC = place.towers(plain, 1, (x_NHWC, axes), out=axes, name=name, rows=rows)
    x_NHWC = place(x_NHWC[:, :count], *axes, name=_output_name(name, place))
    if bias_C is None:
        return x_NHWC
    return place(activate(x_NHWC, bias_C, nnx.relu, fast_forms), *axes)


def _with_halo(x_NHWC, reach, place, channels, name, fill):
    """Return the maps where their windows are computed, and their logical axes.

    reach: a halo.Windows. Where the height is split, each device gets the rows that they read.
    """
    axes = place.map_axes(reach.count, channels)
    if place.splits("image_height"):
        x_NHWC = place(x_NHWC, *axes, name=f"{name} input")
    if place.splits_height(axes):
        x_NHWC = place.overlapping(x_NHWC, axes, reach, name, fill)
    return x_NHWC, axes


def _output_name(name: str, place) -> str:
    """Return what the report calls the pool's output, if the height is split; otherwise none."""
    return f"{name} output" if place.splits("image_height") else ""


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


def average_pool(
    x_NHWC: jax.Array,
    window: int,
    strides: int,
    *,
    place=UNPLACED,
    channels: str = "conv_out",
    name: str = "pool",
) -> jax.Array:
    """Return the means over windows in ceil mode, as in cuda-convnet.

    The sum of a window that reaches over the edge is divided by the area inside the map. place,
    channels, name: as for max_pool.
    """
    sizes = x_NHWC.shape[1:3]
    padding = [(0, windows.overhang(size, window, strides)) for size in sizes]
    counts = [windows.count(size, window, strides, ceil=True) for size in sizes]
    reach = Windows(sizes[0], window, strides, 0, counts[0])
    x_NHWC, axes = _with_halo(x_NHWC, reach, place, channels, name, fill=0)
    rows = place.splits_height(axes)
    if rows:
        padding[0] = 0, 0  # the halo holds the rows beyond the edge
    add_up = functools.partial(
        jax.lax.reduce_window,
        init_value=np.zeros((), x_NHWC.dtype),
        computation=jax.lax.add,
        window_dimensions=(1, window, window, 1),
        window_strides=(1, strides, strides, 1),
        padding=[(0, 0), *padding, (0, 0)],
    )
    sums = place.towers(add_up, 1, (x_NHWC, axes), out=axes, name=name, rows=rows)[:, : counts[0]]
    inside = [
        np.minimum(window, size - strides * np.arange(count))
        for size, count in zip(sizes, counts, strict=True)
    ]
    means = sums / np.outer(*inside)[None, :, :, None].astype(x_NHWC.dtype)
    return place(means, *axes, name=_output_name(name, place))
